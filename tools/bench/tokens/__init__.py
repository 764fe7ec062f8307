"""Token reduction: every reducer and schedule, one budget for weights and tokens, measured latency."""
