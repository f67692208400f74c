"""Register with transformers on `import gptq`, so that quantized checkpoints load with this package's packed layers.

transformers delegates GPTQ checkpoints to optimum and gptqmodel. If both are installed, nothing changes for these. It
delegates pack-quantized ones to compressed-tensors, which does not know experts that are fused in the model. The
classes of `hf_quantization_config` replace the entries for both in two tables (transformers/quantizers/auto.py), so
that `from_pretrained`, `pipeline` and `save_pretrained` work. This module may run while transformers is being imported,
so it imports nothing from transformers until its tables are there.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from gptq.inference.peft_registration import DISPATCHERS, replace_dispatcher

TABLES = "transformers.quantizers.auto"  # the module of transformers that holds the two tables


def register() -> None:
    """Register with each library now if it is imported already, otherwise when it is imported."""
    for name, act in ((TABLES, _replace_entries), (DISPATCHERS, replace_dispatcher)):
        if name in sys.modules:
            act(sys.modules[name])
        elif not any(isinstance(finder, _ImportHook) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _ImportHook(name, act))


class _ImportHook(MetaPathFinder):
    """Import hook that calls `act` on the module called `name` right after it is executed."""

    def __init__(self, name: str, act: Callable[[Any], None]) -> None:
        self.name = name
        self._act = act

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self._act(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def gptqmodel_is_installed() -> bool:
    """Whether gptqmodel and optimum are installed: transformers then loads GPTQ checkpoints with them."""
    return all(importlib.util.find_spec(name) for name in ("optimum", "gptqmodel"))


def _replace_entries(tables: Any) -> None:
    """Replace the entries for the formats of this package in transformers' tables."""
    from gptq.inference.hf_quantization_config import BY_METHOD, GPTQConfig

    for method, kind in BY_METHOD.items():
        if kind is not GPTQConfig or not gptqmodel_is_installed():
            tables.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = kind
            entry = tables.AUTO_QUANTIZER_MAPPING.get(method)
            if not isinstance(entry, _Quantizer):
                tables.AUTO_QUANTIZER_MAPPING[method] = _Quantizer(entry)


class _Quantizer:
    """Makes the quantizer for a configuration: this package's for its own classes, otherwise transformers'."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(self, config: Any, **options: Any) -> Any:
        from gptq.inference.hf_quantization_config import BY_METHOD

        # transformers asks for gptqmodel to quantize; keep its error message
        if not options.get("pre_quantized", True) or not isinstance(config, tuple(BY_METHOD.values())):
            return self.theirs(config, **options)
        from gptq.inference.hf_quantizer import PackedQuantizer

        kind: Any = PackedQuantizer
        return kind(config, **options)
