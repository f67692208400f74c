"""Quantize a checkpoint block by block and layer by layer, and resume stopped runs; start reading at `quantize.py`."""
