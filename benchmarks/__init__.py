"""Measurements, each by itself: `python -m benchmarks.NAME`. A table, and one JSON object as the last line."""
