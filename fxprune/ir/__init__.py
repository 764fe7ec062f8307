"""The nouns: axes, groups, scores, plans, the program, and the passes that carry it on."""
