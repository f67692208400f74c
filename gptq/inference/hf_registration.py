"""Register with transformers on `import gptq`, so that GPTQ checkpoints load with this package's packed layers.

transformers delegates GPTQ checkpoints to optimum and gptqmodel. If both are installed, nothing changes. Otherwise
the classes below replace the entries for the method "gptq" in two tables (transformers/quantizers/auto.py), so that
`from_pretrained`, `pipeline` and `save_pretrained` work. This module may run while transformers is being imported, so
it imports nothing from transformers.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"  # the module of transformers that holds the two tables


def register() -> None:
    """Register now if transformers is imported already, otherwise when it is imported."""
    if TABLES in sys.modules:
        _replace_entries(sys.modules[TABLES])
    elif not any(isinstance(finder, _ImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportHook())


class _ImportHook(MetaPathFinder):
    """Import hook that replaces the entries right after transformers' module of tables is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _replace_entries(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def gptqmodel_is_installed() -> bool:
    """Whether gptqmodel and optimum are installed: transformers then loads GPTQ checkpoints with them."""
    return all(importlib.util.find_spec(name) for name in ("optimum", "gptqmodel"))


def _replace_entries(tables: Any) -> None:
    """Replace the entries for "gptq" in transformers' tables."""
    theirs, their_config = tables.AUTO_QUANTIZER_MAPPING["gptq"], tables.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]
    if gptqmodel_is_installed() or getattr(their_config, "by_gptq", False):
        return

    class GPTQConfig(their_config):  # type: ignore[misc,valid-type]
        """transformers' class, extended to keep all options of the file; the original drops those of single layers."""

        by_gptq = True

        def __init__(self, bits: int, **options: Any) -> None:
            super().__init__(bits, **{key: value for key, value in options.items() if key != OPTIMUM_OPTION})
            self.stored_options: dict[str, Any] = {"bits": bits, **options}

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": "gptq", **self.stored_options}

    def quantizer(config: Any, **options: Any) -> Any:
        if not options.get(
            "pre_quantized", True
        ):  # transformers asks for gptqmodel to quantize; keep its error message
            return theirs(config, **options)
        from gptq.inference.hf_quantizer import PackedQuantizer

        return PackedQuantizer(config, **options)

    tables.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GPTQConfig
    tables.AUTO_QUANTIZER_MAPPING["gptq"] = quantizer


# transformers requires optimum if it sees this option. It is redundant: the tensors show which layers are packed.
OPTIMUM_OPTION = "modules_in_block_to_quantize"
