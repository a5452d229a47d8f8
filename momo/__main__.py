"""Lets `python -m momo` stand for the `momo` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
