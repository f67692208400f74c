"""A LeNet in int8 by its largest absolute values, and what GPTQ buys over that: `python -m lenet_baseline --help`."""
