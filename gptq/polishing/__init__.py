"""Tune a quantized model as a whole towards the original's predictions."""
