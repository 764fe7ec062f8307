"""The command of tokens/tokens.py: token reduction at equal cost."""

from start import start

start("tokens.tokens")
