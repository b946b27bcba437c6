"""Teachers: adapters that let networks of other projects, and a small one of ours, be read as denoisers."""
