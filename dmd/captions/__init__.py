"""Captions that nobody wrote: concepts, templates and language models, as SynCLR makes them (arXiv 2312.17742)."""
