"""Decide, from headers and config.json alone: plan, memory, cost and bit allocation, before a weight is read."""
