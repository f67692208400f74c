"""Decided before a weight is read: plan, memory, cost, widths."""
