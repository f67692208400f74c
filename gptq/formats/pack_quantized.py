"""compressed-tensors' file format pack-quantized, which llm-compressor writes.

With codes and zero points that are signed and carry an offset of 2^(bits - 1), hence the same bits as GPTQ's, a linear
layer P with `out` outputs and `in` inputs in groups of g is stored as

    P.weight_packed      (out, ceil(in * bits / 32))      int32  codes, packed along the inputs
    P.weight_scale       (out, in / g)                    float  in the model's dtype, or float16 as here
    P.weight_zero_point  (ceil(out * bits / 32), in / g)  int32  zero, packed along the outputs; asymmetric only
    P.weight_shape       (2,)                             int64  out, in
    P.weight_g_idx       (in,)                            int32  in files of older releases with act-order by groups

Packing is one dense bit stream; compressed-tensors before 0.18 padded the words of 3, 5, 6 and 7 bits instead (its
change #715). The `quantization_config` in config.json gives groups of targets (names, `re:` expressions, or the class
Linear) and a list of what to ignore.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from gptq.checkpoint.json_objects import Options, read_options
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.formats.format import SCALE_DTYPE, FileFormat
from gptq.formats.name_rules import Quantization, check_expression, name_patterns
from gptq.formats.packing import num_words, pack, unpack
from gptq.formats.scheme import Linears, Scheme, contiguous_groups, names_by_scheme
from gptq.solver import Codes

METHOD = "compressed-tensors"


class PackQuantized(FileFormat):
    name: Format = "pack-quantized"
    quant_method = METHOD
    codes_key, scale_key, zero_key, g_idx_key = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
    other_keys = ("weight_shape",)
    usage = (
        "from transformers import AutoModelForCausalLM  # with compressed-tensors installed",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this repository")',
    )
    has_g_idx = False
    inputs_first = False
    needs_whole_words = False
    keeps_scale_dtype = True

    def refusal(self, scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
        if transposed:
            return "compressed-tensors reads nn.Linear, and this layer is a Conv1D"
        if scheme.scattered:
            return "compressed-tensors has no g_idx any more, which act-order with dynamic groups needs"
        if inputs % scheme.columns(inputs):
            return f"compressed-tensors needs whole groups, and {scheme.group_size} does not divide the {inputs} inputs"
        return None

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        groups, int32 = scheme.groups(inputs), torch.int32
        zeros = TensorInfo(int32, (num_words(outputs, scheme.bits), groups))
        return {
            "weight_packed": TensorInfo(int32, (outputs, num_words(inputs, scheme.bits))),
            "weight_scale": TensorInfo(scale_dtype, (outputs, groups)),
            "weight_shape": TensorInfo(torch.int64, (2,)),
            **({} if scheme.sym else {"weight_zero_point": zeros}),
            **({"weight_g_idx": TensorInfo(int32, (inputs,))} if scheme.scattered else {}),
        }

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        if scheme.scattered:
            raise ValueError("groups that are not runs of columns are read from older files, and no longer written")
        return {
            "weight_packed": pack(layer.codes.T, scheme.bits).T.contiguous(),
            "weight_scale": layer.scale.to(scale_dtype).contiguous(),
            "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
            **({} if scheme.sym else {"weight_zero_point": pack(layer.zero, scheme.bits)}),
        }

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        outputs, inputs = (int(n) for n in packed["weight_shape"])
        codes = unpack(packed["weight_packed"].T, scheme.bits, inputs).T
        zero, g_idx = self.decode_zeros(packed, scheme, outputs), self.decode_groups(packed, scheme, inputs)
        return Codes(codes, packed["weight_scale"], zero, g_idx)

    def decode_groups(self, packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
        if scheme.scattered:
            return packed["weight_g_idx"]
        return contiguous_groups(scheme, inputs).to(packed["weight_scale"].device)

    def decode_zeros(self, packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
        if not scheme.sym:
            return unpack(packed["weight_zero_point"], scheme.bits, outputs)
        scale = packed["weight_scale"]
        return torch.full(scale.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8, device=scale.device)

    def stored_shape(self, source: Source, layer: str) -> tuple[int, int]:
        name = f"{layer}.weight_shape"
        info = source.tensors[name]
        if info.shape != (2,) or info.dtype.is_floating_point:
            raise InputError(f"{name} in {source.folder} is {info}, not two integers")
        outputs, inputs = source.read(name).tolist()
        if outputs < 1 or inputs < 1:
            raise InputError(f"{name} in {source.folder} says {outputs} x {inputs}")
        return outputs, inputs

    def explain_shape(self, info: TensorInfo, scheme: Scheme, outputs: int, inputs: int) -> str:
        if info.shape != (outputs, -(-inputs // (32 // scheme.bits))):
            return ""
        return "; compressed-tensors before 0.18 padded words of this width, write the file again with a newer one"

    def write_config(self, linears: Linears, config: QuantConfig | None) -> dict[str, Any]:
        names, by_scheme = [*linears.layers, *linears.kept], names_by_scheme(linears.layers)
        groups: dict[str, Any] = {}
        for number, (scheme, chosen) in enumerate(by_scheme.items()):
            targets = (
                ["Linear"] if len(by_scheme) == 1 else [f"re:{pattern}" for pattern in name_patterns(chosen, names)]
            )
            groups[f"group_{number}"] = self._group(scheme, targets)
        return {
            "quant_method": METHOD,
            "format": self.name,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*(f"re:{pattern}" for pattern in name_patterns(linears.kept, names)), *linears.others],
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
        }

    def _group(self, scheme: Scheme, targets: list[str]) -> dict[str, Any]:
        return {
            "targets": targets,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.sym,
                "strategy": "channel" if scheme.group_size == -1 else "group",
                "group_size": None if scheme.group_size == -1 else scheme.group_size,
                "actorder": None,
                "dynamic": False,
                "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
            "format": self.name,
        }

    def read_config(self, where: str | Path, quantization: Mapping[str, Any]) -> Quantization:
        read = read_options(_Config, quantization, str(where))
        exact: list[tuple[str, Scheme | None]] = []
        expressions: list[tuple[str, Scheme | None]] = []
        everywhere: Scheme | None = None
        for name, values in read.config_groups.items():
            group = read_options(_Group, values, f"{where}, {name},")
            weights = read_options(_Weights, group.weights, f"{where}, {name},")
            scheme = Scheme(weights.num_bits, weights.columns, weights.symmetric, self.name, weights.is_scattered)
            for target in _checked_targets(where, group.targets):
                if target == "Linear":
                    everywhere = scheme
                elif target.startswith("re:"):
                    expressions.append((target[3:], scheme))
                else:
                    exact.append((f"{re.escape(target)}$", scheme))
        ignored = [
            (target[3:] if target.startswith("re:") else f"{re.escape(target)}$", None)
            for target in _checked_targets(where, read.ignore)
        ]
        return Quantization(self.name, everywhere, (*ignored, *exact, *expressions))


# --- quantization_config ----------------------------------------------------------------------------------------------


def _require_format(name: str | None) -> str | None:
    if name not in (PackQuantized.name, None):
        raise ValueError("format")
    return name


def _require_known_format(name: str) -> str:
    return name if name == "mixed-precision" else _require_format(name) or name


def _require_nothing(value: Any) -> None:
    if value:
        raise ValueError("something")


def _require_int(kind: str) -> str:
    if kind != "int":
        raise ValueError("type")
    return kind


Targets = Annotated[list[str], BeforeValidator(lambda listed: listed or [])]
ReadFormat = Annotated[str | None, AfterValidator(_require_format)]
Nothing = Annotated[Any, AfterValidator(_require_nothing)]


class _Config(Options):
    format: Annotated[str, AfterValidator(_require_known_format)] = Field(
        description="of compressed-tensors files those in 'pack-quantized' format are read"
    )
    config_groups: Annotated[dict[str, Any], Field(min_length=1)] = Field(
        description="it is an object that holds groups"
    )
    ignore: Targets = Field([], description="it is a list of names")


class _Group(Options):
    targets: Targets = Field([], description="it is a list of names")
    weights: Annotated[dict[str, Any], BeforeValidator(lambda weights: weights or {})] = Field(
        {}, description="it is an object"
    )
    input_activations: Nothing = Field(None, description="only weights are read")
    output_activations: Nothing = Field(None, description="only weights are read")
    format: ReadFormat = Field(None, description="'pack-quantized' is read")


class _Weights(Options):
    num_bits: Annotated[int, Field(ge=1, le=8)] = Field(description="1 to 8 bits are read")
    type: Annotated[str, AfterValidator(_require_int)] = Field("int", description="codes of 'int' are read")
    strategy: Any = None
    group_size: Any = None
    symmetric: bool = Field(True, description="it is true or false")
    actorder: Any = None

    @property
    def columns(self) -> int:
        """Columns per group, -1 for one group per row."""
        size: int = -1 if self._strategy == "channel" else self.group_size
        return size

    @property
    def _strategy(self) -> Any:
        return self.strategy or ("channel" if self.group_size in (-1, None) else "group")

    @property
    def is_scattered(self) -> bool:
        """Whether groups are not runs of columns."""
        return self.actorder in ("group", "dynamic", True)

    @model_validator(mode="after")
    def _require_size(self) -> "_Weights":
        strategy, columns = self._strategy, self.columns
        if strategy not in ("group", "channel") or type(columns) is not int or columns < -1 or columns == 0:
            said = f"strategy {strategy!r}, group_size {self.group_size!r}"
            raise ValueError(f"says {said}; a 'group' has a size, or it is a 'channel'")
        return self


def _checked_targets(where: str | Path, targets: list[str]) -> list[str]:
    for target in targets:
        if target.startswith("re:"):
            check_expression(where, target[3:])
    return targets
