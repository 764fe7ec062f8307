"""Plain data as pages and pictures."""
