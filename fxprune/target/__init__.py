"""A target: lowered to it, proven equal, timed."""
