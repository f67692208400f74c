"""A LeNet quantized to int8 by max-abs scales and compared with GPTQ: `python -m lenet_baseline --help`."""
