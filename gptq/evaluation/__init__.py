"""Measure perplexity and KL divergence, and show a checkpoint's record and measurements as a page with charts."""
