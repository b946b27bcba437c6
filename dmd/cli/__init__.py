"""The commands. Parsing is separate from work, so that `--help` answers without importing torch."""
