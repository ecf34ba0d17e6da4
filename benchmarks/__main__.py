"""Prints ratios to peers: `python -m benchmarks [--quick] [--only NAME ...]`."""

import sys

from benchmarks.program import main

if __name__ == "__main__":
    sys.exit(main())
