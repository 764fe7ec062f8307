"""Installed as ``fxprune.backends``."""

if __name__ != "fxprune.backends":  # a second copy of every class would make isinstance checks fail silently
    raise ImportError("import 'fxprune.backends': the folder 'backends' is only its source")
