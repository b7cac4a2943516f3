"""The channel between guest driver and host agent: what crosses it, and in which order."""
