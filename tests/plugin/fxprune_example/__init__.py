"""A package that adds one of everything to fxprune. `fxprune help plugins` shows these files."""
