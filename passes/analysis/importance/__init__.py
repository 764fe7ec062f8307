"""Importance criteria: one file each. To add one, copy ``l2.py`` and name it in ``registry.CRITERIA``."""
