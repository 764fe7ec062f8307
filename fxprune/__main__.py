"""``python -m fxprune`` is the same command as ``fxprune``."""

import sys

from .cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
