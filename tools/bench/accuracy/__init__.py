"""What is kept at equal cost, on real weights and labels: fxprune, its criteria and its peer."""
