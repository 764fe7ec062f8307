"""``python -m fxprune`` is the same command as ``fxprune``."""

import sys

from .cli.entry import start

if __name__ == "__main__":
    sys.exit(start())
