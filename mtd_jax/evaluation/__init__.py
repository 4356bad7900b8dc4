"""Measurements: speed against the hardware's limits."""
