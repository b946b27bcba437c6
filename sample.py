"""One-step images: `python sample.py [CLASS ...] --student runs/digits/student --seeds 0-7 --out out`."""

import sys

from dmd.cli.sample import main

if __name__ == "__main__":
    main(sys.argv[1:])
