"""GPTQ for Hugging Face checkpoints, block by block: quantize, load, measure."""

from gptq.config import QuantConfig
from gptq.engine import quantize
from gptq.errors import InputError
from gptq.evaluate import perplexity
from gptq.linear import load
from gptq.version import __version__

__all__ = ["InputError", "QuantConfig", "__version__", "load", "perplexity", "quantize"]
