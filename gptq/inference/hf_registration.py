"""What `import gptq` adds to transformers: GPTQ checkpoints load with our packed layers where nothing else loads them.

transformers hands GPTQ checkpoints to optimum and gptqmodel. With both installed nothing changes. Otherwise its two
tables for the method "gptq" (transformers/quantizers/auto.py) are given the classes below, so that `from_pretrained`,
`pipeline` and `save_pretrained` work. This module is executed while transformers is imported and so imports nothing
of it by itself.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"


def register() -> None:
    """Now, if transformers is imported already; else as soon as it is."""
    if TABLES in sys.modules:
        _enter(sys.modules[TABLES])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Sees transformers' module of tables being imported, and enters ours when it is."""

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

        def execute_and_enter(module: ModuleType) -> None:
            execute(module)
            _enter(module)

        spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec


def others_load_gptq() -> bool:
    """Whether optimum and gptqmodel are installed, which transformers then loads GPTQ checkpoints with."""
    return all(importlib.util.find_spec(name) for name in ("optimum", "gptqmodel"))


def _enter(tables: Any) -> None:
    """Put our classes into transformers' tables."""
    theirs, their_config = tables.AUTO_QUANTIZER_MAPPING["gptq"], tables.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]
    if others_load_gptq() or getattr(their_config, "by_gptq", False):
        return

    class GPTQConfig(their_config):  # type: ignore[misc,valid-type]
        """transformers' own, which drops what it does not know; what a file says of single layers is kept here."""

        by_gptq = True

        def __init__(self, bits: int, **options: Any) -> None:
            super().__init__(bits, **{key: value for key, value in options.items() if key != FILES_OWN})
            self.as_stored: dict[str, Any] = {"bits": bits, **options}

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": "gptq", **self.as_stored}

    def quantizer(config: Any, **options: Any) -> Any:
        if not options.get("pre_quantized", True):  # quantizing is what gptqmodel would do; say so in their words
            return theirs(config, **options)
        from gptq.inference.hf_quantizer import PackedQuantizer

        return PackedQuantizer(config, **options)

    tables.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GPTQConfig
    tables.AUTO_QUANTIZER_MAPPING["gptq"] = quantizer


FILES_OWN = (
    "modules_in_block_to_quantize"  # transformers would ask for optimum; which layers are packed, the file tells
)
