"""The journey of a checkpoint, block by block; start reading at `quantize.py`."""
