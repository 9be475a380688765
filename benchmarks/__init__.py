"""Measurements of every op against other implementations and against the machine's limits."""
