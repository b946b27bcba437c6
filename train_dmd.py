"""Distil a diffusion teacher into a one-step student: `python train_dmd.py [PRESET] [--flags]`."""

import sys

from dmd.cli.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
