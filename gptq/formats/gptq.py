"""GPTQ's file format, version 1 as AutoGPTQ made it and version 2 as GPTQModel did.

For a linear layer P with `out` outputs and `in` inputs in groups of g it stores

    P.qweight  (ceil(in * bits / 32), out)            int32    codes, packed along the inputs
    P.qzeros   (ceil(in / g), ceil(out * bits / 32))  int32    zero (v2) or zero - 1 (v1), packed along the outputs
    P.scales   (ceil(in / g), out)                    float16
    P.g_idx    (in,)                                  int32    group of each input

Early tools (GPTQ-for-LLaMa) and AutoRound leave g_idx out, where groups are runs of columns. Such files are read too.
If the group size does not divide the number of inputs, the last group is short. If the codes do not fill the last
word, its remaining bits are zero. The `quantization_config`, in config.json and again in quantize_config.json, gives
one scheme for all layers and `dynamic` rules for exceptions: regular expressions that readers match from the start of a
layer's name, the first match wins, and `-:` in front means "not quantized".
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from gptq.checkpoint.json_objects import Options, read_options
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.formats.format import SCALE_DTYPE, FileFormat
from gptq.formats.name_rules import Quantization, check_expression, name_patterns
from gptq.formats.option_keys import check_keys
from gptq.formats.packing import num_words, pack, unpack
from gptq.formats.scheme import (
    Layers,
    Linears,
    Scheme,
    contiguous_groups,
    most_common_scheme,
    names_by_scheme,
    normalized_scheme,
)
from gptq.solver import Codes
from gptq.version import __version__

METHOD = "gptq"
GPTQ_BITS = (2, 3, 4, 8)
QUANTIZE_CONFIG = "quantize_config.json"


class Gptq(FileFormat):
    """What versions 1 and 2 of the format have in common."""

    quant_method = METHOD
    codes_key, scale_key, zero_key, g_idx_key = "qweight", "scales", "qzeros", "g_idx"
    optional_keys = frozenset({"g_idx"})
    config_files = (QUANTIZE_CONFIG,)
    usage = (
        "import gptq  # lets transformers load GPTQ files",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this repository")',
    )
    has_g_idx = True
    inputs_first = True
    needs_whole_words = True
    keeps_scale_dtype = False

    def refusal(self, scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
        return None if scheme.bits in GPTQ_BITS else f"GPTQ files hold 2, 3, 4 or 8 bits, not {scheme.bits}"

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        groups, int32 = scheme.groups(inputs), torch.int32
        return {
            "qweight": TensorInfo(int32, (num_words(inputs, scheme.bits), outputs)),
            "qzeros": TensorInfo(int32, (groups, num_words(outputs, scheme.bits))),
            "scales": TensorInfo(scale_dtype, (groups, outputs)),
            "g_idx": TensorInfo(int32, (inputs,)),
        }

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        return {
            "qweight": pack(layer.codes.T, scheme.bits),
            "qzeros": self._encode_zeros(layer.zero, scheme, allow_zero),
            "scales": layer.scale.to(scale_dtype).T.contiguous(),
            "g_idx": layer.g_idx,
        }

    def _encode_zeros(self, zero: Tensor, scheme: Scheme, allow_zero: bool) -> Tensor:
        """qzeros (groups, words) of zero points (outputs, groups).

        GPTQModel (utils/model.py, convert_gptq_v2_to_v1_format_module) subtracts 1 from every field at 3 bits. At other
        widths it subtracts a word of ones from the whole word as one number: a zero point of 0 borrows from its
        neighbour, and so do unused fields.
        """
        if not self.zero_offset:
            return pack(zero, scheme.bits).T.contiguous()
        if _offset_by_words(scheme):
            return pack(zero, scheme.bits).T.contiguous() - _ones(scheme.bits)
        if not allow_zero and not int(zero.min()):
            raise ValueError("a zero point is 0, which GPTQ v1 stores as -1, about which its readers disagree")
        return pack((zero.int() - 1) & (2**scheme.bits - 1), scheme.bits).T.contiguous()

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        scale, words = packed["scales"].T, packed["qweight"]
        inputs = len(packed["g_idx"]) if "g_idx" in packed else num_inputs(len(words), scheme.bits)
        codes = unpack(words, scheme.bits, inputs).T
        zero, g_idx = self.decode_zeros(packed, scheme, len(scale)), self.decode_groups(packed, scheme, inputs)
        return Codes(codes, scale, zero, g_idx)

    def decode_groups(self, packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
        if "g_idx" in packed:
            return packed["g_idx"]
        return contiguous_groups(scheme, inputs).to(packed["scales"].device)

    def decode_zeros(self, packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
        """Return the zero points; a v1 field of all ones stands for 0, as for readers that mask after adding 1."""
        qzeros = packed["qzeros"]
        if not self.zero_offset:
            return unpack(qzeros.T, scheme.bits, outputs)
        if _offset_by_words(scheme):  # the sum wraps around like the subtraction did
            return unpack((qzeros + _ones(scheme.bits)).T, scheme.bits, outputs)
        zero: Tensor = (unpack(qzeros.T, scheme.bits, outputs) + 1) & (2**scheme.bits - 1)
        return zero

    def stored_shape(self, source: Source, layer: str, scheme: Scheme) -> tuple[int, int]:
        if f"{layer}.g_idx" not in source.tensors:
            return _shape_without_g_idx(source, layer, scheme)
        g_idx, scales = (source.tensors[f"{layer}.{key}"].shape for key in ("g_idx", "scales"))
        if len(g_idx) != 1 or len(scales) != 2 or 0 in (*g_idx, *scales):
            shapes = f"g_idx {g_idx} and scales {scales}"
            raise InputError(f"{layer} in {source.folder} has {shapes}; they are one row of columns, and a matrix")
        return scales[1], g_idx[0]

    def write_config(self, linears: Linears, config: QuantConfig | None) -> dict[str, Any]:
        """Return the `quantization_config`; `desc_act` means, as for readers, that groups are not runs of columns."""
        everywhere = self._scheme_of_options(config) if config else most_common_scheme(linears.layers)
        rules = dynamic_rules(everywhere, linears.layers, linears.kept)
        return {
            "quant_method": METHOD,
            "checkpoint_format": self.name,
            "bits": everywhere.bits,
            "group_size": everywhere.group_size,
            "sym": everywhere.sym,
            "desc_act": everywhere.scattered,
            "lm_head": any(not re.search(r"\.\d+\.", f".{name}.") for name in linears.layers),
            **(_options_of_solver(config) if config else {}),
            **({"dynamic": rules} if rules else {}),
            "meta": {
                "quantizer": [f"gptq:{__version__}"],
                **({"method": config.method, "act_order": config.desc_act} if config else {}),
            },
        }

    def _scheme_of_options(self, config: QuantConfig) -> Scheme:
        """Return the scheme of layers that no override changes."""
        shuffled = config.shuffles_groups and config.group_size != -1
        return Scheme(config.bits, config.group_size, config.sym, self.name, shuffled)

    def rename_config(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        names = {key: self.name for key in ("checkpoint_format", "format") if key in quantization}
        return {**quantization, "checkpoint_format": self.name, **names}

    def read_config(
        self, where: str | Path, quantization: Mapping[str, Any], family: Sequence[FileFormat]
    ) -> Quantization:
        said = {key: quantization[key] for key in ("checkpoint_format", "format") if quantization.get(key) is not None}
        names = [name for name in NAMES if name in said.values()]
        if any(value not in NAMES for value in said.values()):
            raise InputError(
                f"{where} says format {' and '.join(map(repr, said.values()))}; of GPTQ files those in the formats "
                f"{' and '.join(map(repr, NAMES))} are read"
            )
        if len(names) > 1:
            raise InputError(f"{where} contradicts itself: {said}")
        check_keys(str(where), quantization)
        return read_schemes(where, quantization, names[0] if names else GptqV1.name)


class GptqV1(Gptq):
    """Version 1: zero points are reduced by 1 when they are stored."""

    name: Format = "gptq"
    zero_offset = 1


class GptqV2(Gptq):
    """Version 2: zero points are stored as they are."""

    name: Format = "gptq_v2"


NAMES: tuple[Format, ...] = (GptqV1.name, GptqV2.name)


def num_inputs(words: int, bits: int) -> int:
    """Return the inputs whose codes fill this many words per output."""
    return words * 32 // bits


def _shape_without_g_idx(source: Source, layer: str, scheme: Scheme) -> tuple[int, int]:
    words, scales = (source.tensors[f"{layer}.{key}"].shape for key in ("qweight", "scales"))
    if len(words) != 2 or len(scales) != 2 or 0 in (*words, *scales):
        raise InputError(f"{layer} in {source.folder} has qweight {words} and scales {scales}; they are matrices")
    inputs = num_inputs(words[0], scheme.bits)
    if scheme.scattered and scheme.columns(inputs) < inputs:
        raise InputError(
            f"{layer} in {source.folder} has no g_idx, which says the group of each column where desc_act is true and "
            f"the group size {scheme.group_size}; set desc_act to false in its quantization_config if groups are runs "
            "of columns"
        )
    return scales[1], inputs


def _offset_by_words(scheme: Scheme) -> bool:
    """Whether 1 was taken off the zero points word by word."""
    return scheme.by_gptqmodel and scheme.bits != 3


def _ones(bits: int) -> int:
    """A word of ones at the width of 2, 4 or 8 bits."""
    return sum(1 << i for i in range(0, 32, bits))


# --- quantization_config ----------------------------------------------------------------------------------------------


def _options_of_solver(config: QuantConfig) -> dict[str, Any]:
    return {"true_sequential": True, "static_groups": config.static_groups, "damp_percent": config.damp_percent}


def dynamic_rules(everywhere: Scheme, layers: Layers, kept: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the `dynamic` entry of a `quantization_config`, expression -> options.

    It has rules for layers whose scheme differs from the default, `everywhere`, and for the layers in `kept`, which are
    not quantized.
    """
    names = [*layers, *kept]
    rules: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in name_patterns(kept, names)}
    for scheme, chosen in names_by_scheme(layers).items():
        own = [name for name in chosen if normalized_scheme(everywhere, layers[name][1]) != scheme]
        values = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
        if scheme.scattered != everywhere.scattered and scheme.group_size != -1:
            values["desc_act"] = scheme.scattered
        rules |= {f"+:{pattern}": values for pattern in name_patterns(own, names)}
    return rules


def _require_gptq_bits(bits: int) -> int:
    if bits not in GPTQ_BITS:
        raise ValueError("width")
    return bits


def _require_group_size(size: int) -> int:
    if size != -1 and size < 1:
        raise ValueError("size")
    return size


class _SchemeOptions(Options):
    bits: Annotated[int, AfterValidator(_require_gptq_bits)] = Field(description="GPTQ files hold 2, 3, 4 or 8")
    group_size: Annotated[int, AfterValidator(_require_group_size)] = Field(
        description="it is -1 or a number of columns"
    )
    sym: bool = Field(False, description="it is true or false")  # without it, the zero points in the file are used
    desc_act: bool = Field(False, description="it is true or false")


class _Rules(Options):
    dynamic: Annotated[dict[str, dict[str, Any]], BeforeValidator(lambda rules: rules or {})] = Field(
        {}, description="it holds rules by expression, each an object of options"
    )


def read_schemes(where: str | Path, quantization: Mapping[str, Any], name: Format) -> Quantization:
    """Return what the options of a `quantization_config`, and its `dynamic` rules, say of the layers.

    Raises:
        InputError: an option is missing, wrong or not known, or a rule is not a regular expression.
    """
    by_gptqmodel = name == GptqV1.name and any(maker.startswith("gptqmodel") for maker in _makers(quantization))
    everywhere = _read_scheme(str(where), quantization, name, by_gptqmodel)
    rules: list[tuple[str, Scheme | None]] = []
    for rule, options in read_options(_Rules, quantization, str(where)).dynamic.items():
        pattern = re.sub(r"^[+-]:", "", rule)
        check_expression(f"{where}, dynamic", pattern)
        if rule.startswith("-:"):
            rules.append((pattern, None))
        else:
            check_keys(f"{where}, dynamic {rule!r},", options)
            own = _read_scheme(f"{where}, dynamic {rule!r},", {**quantization, **options}, name, by_gptqmodel)
            rules.append((pattern, own))
    return Quantization(name, everywhere, tuple(rules))


def _makers(quantization: Mapping[str, Any]) -> list[str]:
    """Return the tools that made the file, as its `meta` names them."""
    meta = quantization.get("meta")
    makers = meta.get("quantizer", ()) if isinstance(meta, dict) else ()
    return [str(maker) for maker in makers] if isinstance(makers, list | tuple) else [str(makers)]


def _read_scheme(where: str, values: Mapping[str, Any], name: Format, by_gptqmodel: bool) -> Scheme:
    read = read_options(_SchemeOptions, values, where)
    return Scheme(read.bits, read.group_size, read.sym, name, read.desc_act, by_gptqmodel)
