"""GPTQ for Hugging Face checkpoints, block by block: quantize, load, measure."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptq.inference.hf_registration import register
from gptq.version import __version__

if TYPE_CHECKING:
    from gptq.config import Override, PolishConfig, QuantConfig
    from gptq.errors import InputError
    from gptq.evaluation.evaluate import compare, perplexity
    from gptq.inference.load import load
    from gptq.output.convert import convert
    from gptq.polishing.polish import polish
    from gptq.polishing.quantize import quantize

__all__ = [
    "InputError", "Override", "PolishConfig", "QuantConfig", "__version__", "compare", "convert", "load", "perplexity",
    "polish", "quantize",
]  # fmt: skip

_HOMES = {
    "InputError": "errors",
    "Override": "config",
    "convert": "output.convert",
    "PolishConfig": "config",
    "QuantConfig": "config",
    "compare": "evaluation.evaluate",
    "load": "inference.load",
    "perplexity": "evaluation.evaluate",
    "polish": "polishing.polish",
    "quantize": "polishing.quantize",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers when a name is first used, so that `import gptq` is fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"gptq.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register()
