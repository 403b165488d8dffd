"""Adapters in memory, within a budget: what comes in, for whom, who waits for room, and what leaves."""
