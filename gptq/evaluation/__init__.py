"""Perplexity, KL divergence, report, charts: measured and drawn."""
