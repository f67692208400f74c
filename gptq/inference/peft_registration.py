"""Let PEFT put LoRA adapters on packed layers, through the layer that it has for GPTQ.

The packed weight stays as it is, and gradients flow through it to the adapters. PEFT asks one function after the other
for an adapter's layer; the one for GPTQ knows gptqmodel's layers only. Nothing of PEFT is imported here.
"""

import warnings
from typing import Any

DISPATCHERS = "peft.tuners.lora.model"  # the module of PEFT that asks these functions


def replace_dispatcher(module: Any) -> None:
    """Replace PEFT's function for GPTQ by one that also knows this package's layers."""
    theirs = getattr(module, "dispatch_gptq", None)
    if theirs is None or getattr(theirs, "by_gptq", False):
        return

    def dispatch(target: Any, adapter_name: str, *arguments: Any, **options: Any) -> Any:
        from peft.tuners.lora.gptq import GPTQLoraLinear

        from gptq.inference.quant_linear import QuantLinear

        layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(layer, QuantLinear):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unsupported layer type")  # it reads the sizes nevertheless
                return GPTQLoraLinear(target, adapter_name, *arguments, **options)
        return theirs(target, adapter_name, *arguments, **options)

    dispatch.by_gptq = True  # type: ignore[attr-defined]
    module.dispatch_gptq = dispatch
