"""A model comes in, and nothing that came with it runs."""
