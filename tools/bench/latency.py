"""The command of latency/latency.py: saved MACs as saved time."""

from start import start

start("latency.latency")
