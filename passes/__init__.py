"""Installed as ``fxprune.passes``."""

if __name__ != "fxprune.passes":  # a second copy of every class would make isinstance checks fail silently
    raise ImportError("import 'fxprune.passes': the folder 'passes' is only its source")
