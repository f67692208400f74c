"""MLX's affine format, which mlx-lm, LM Studio and others load on a Mac.

A linear layer P with `out` outputs and `in` inputs in groups of g is stored as

    P.weight  (out, in * bits / 32)  uint32  codes, one dense bit stream along the inputs
    P.scales  (out, in / g)          float   in the model's dtype
    P.biases  (out, in / g)          float   in the same dtype; w = scales * code + biases

config.json says it twice, as mlx-lm writes it: `quantization`, which MLX reads, has bits and group size, and under
the name of a layer those of the layer, if they are others. `quantization_config` repeats that; there a file of this
package also names itself (`quant_method`), and says which layers are symmetric, that is biases = -2^(bits - 1) scales.
Experts are stacked: P.switch_mlp.gate_proj.weight is (experts, out, words), and so on.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from gptq.checkpoint.assembled import Place, TensorIndex
from gptq.checkpoint.json_objects import Options, read_options
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.writer import ShardWriter
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.formats.format import PLAIN_KEY, SCALE_DTYPE, FileFormat
from gptq.formats.name_rules import Quantization
from gptq.formats.packing import num_words, pack, unpack
from gptq.formats.scheme import Layers, Linears, Scheme, contiguous_groups
from gptq.solver import Codes, Grid, IntegerGrid
from gptq.solver.grids.affine import AffineGrid
from gptq.solver.grids.scales import FloatScales

METHOD = "mlx"
CONFIG_KEY = "quantization"  # the entry of config.json that MLX reads
MLX_BITS, MLX_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)$")  # a matrix of an expert, as checkpoints call it
STACK = "switch_mlp"
ADDED_KEY = "added"  # lists the entries of config.json that were added for MLX
OWN_KEY = "quantization_config"  # the entry of config.json in which this package reads
OWN_KEYS = ("quant_method", "sym", ADDED_KEY)  # in `quantization_config` alone
OLDER_KEYS = (
    "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct", "rotary_emb_base",
    "num_experts",
)  # fmt: skip
STACKED_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # mlx-lm's names of Mixtral's


class Mlx(FileFormat):
    name: Format = "mlx"
    quant_method = METHOD
    widths = MLX_BITS
    stacks_experts = True
    codes_key, scale_key, zero_key, g_idx_key = PLAIN_KEY, "scales", "biases", ""
    usage = (
        "from mlx_lm import generate, load",
        "",
        'model, tokenizer = load("this repository")',
        'print(generate(model, tokenizer, "Once upon a time"))',
    )
    has_g_idx = False
    inputs_first = False
    needs_whole_words = False
    keeps_scale_dtype = True
    is_source = False
    ignores_windows_of = frozenset({"mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3"})

    def refusal(self, scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
        size = scheme.columns(inputs)
        if transposed:
            return "MLX transposes the weight of a Conv1D when it loads"
        if scheme.bits not in MLX_BITS:
            return f"MLX has {', '.join(map(str, MLX_BITS))} bits, not {scheme.bits}"
        if scheme.scattered:
            return "MLX has no g_idx, which act-order with dynamic groups needs"
        if size not in MLX_GROUPS or inputs % size:
            return f"MLX has groups of 32, 64 or 128 that divide the inputs; here {size} of {inputs} inputs"
        return None

    def choose_scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return bfloat16 for a bfloat16 model: MLX computes in float32 where scales and activations differ."""
        return dtype if dtype == torch.bfloat16 else SCALE_DTYPE

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE) -> Grid:
        if scheme.sym:  # 2^(bits - 1) scales, the biases, are numbers of the same dtype
            return IntegerGrid(scheme.bits, True, FloatScales(scale_dtype, reach=2 ** (scheme.bits - 1)))
        return AffineGrid(scheme.bits, FloatScales(scale_dtype))

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        groups = TensorInfo(scale_dtype, (outputs, scheme.groups(inputs)))
        words = TensorInfo(torch.uint32, (outputs, num_words(inputs, scheme.bits)))
        return {"weight": words, "scales": groups, "biases": groups}

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        scale = layer.scale.to(scale_dtype).contiguous()
        biases = -(layer.zero.float() * scale.float()) if layer.offset is None else layer.offset  # (outputs, groups)
        stored = biases.to(scale_dtype).contiguous()
        if not torch.equal(stored.float(), biases.float()):
            raise ValueError("a zero point times its scale, or an offset, is not exact in the dtype of MLX's biases")
        return {
            "weight": pack(layer.codes.T, scheme.bits).T.contiguous().view(torch.uint32),
            "scales": scale,
            "biases": stored,
        }

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        words, scale = packed["weight"].view(torch.int32), packed["scales"]
        inputs = words.shape[1] * 32 // scheme.bits
        codes = unpack(words.T, scheme.bits, inputs).T
        zero, g_idx = self.decode_zeros(packed, scheme, len(scale)), self.decode_groups(packed, scheme, inputs)
        return Codes(codes, scale, zero, g_idx, offset=None if scheme.sym else packed["biases"])

    def decode_groups(self, packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
        return contiguous_groups(scheme, inputs).to(packed["scales"].device)

    def decode_zeros(self, packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
        """Return the zero points of a symmetric layer, 0 for a group that is not symmetric; else zeros: see `grid`."""
        if not scheme.sym:
            return torch.zeros_like(packed["scales"], dtype=torch.uint8)
        middle = 2 ** (scheme.bits - 1)
        zero: Tensor = (packed["biases"].float() == -middle * packed["scales"].float()).to(torch.uint8) * middle
        return zero

    def stored_shape(self, source: Source, layer: str, scheme: Scheme) -> tuple[int, int]:
        name = f"{layer}.weight"
        shape = source.tensors[name].shape
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"{name} in {source.folder} has the shape {shape}; it is a matrix of words")
        return shape[0], shape[1] * 32 // scheme.bits

    def layers_refusal(self, layers: Layers) -> str | None:
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        for name, layer in layers.items():
            path, own = _module_path(name), _options(*layer)
            first, theirs = found.setdefault(path, (name, own))
            if own != theirs:
                return f"MLX stacks {first} and {name}, which need the same bits, group size and symmetry"
        return None

    def assembles(self, tensors: Collection[str]) -> bool:
        return any(EXPERT.fullmatch(name.rpartition(".")[0]) for name in tensors)

    def assemble(self, folder: Path, out: Path) -> TensorIndex | None:
        """Stack the matrices of experts as `sanitize` of mlx-lm's models does."""
        source = Source(folder)
        stacks = _find_stacks(source)
        if not stacks:
            return None
        inside = {name for parts in stacks.values() for name in parts}
        tensors = {name: info for name, info in source.tensors.items() if name not in inside}
        for name, parts in stacks.items():
            info = source.tensors[parts[0]]
            tensors[name] = TensorInfo(info.dtype, (len(parts), *info.shape))
        writer = ShardWriter(out, tensors)
        try:
            for name in tensors:
                matrices = [source.read_unchecked(part) for part in stacks.get(name, [name])]
                writer.write(name, torch.stack(matrices) if name in stacks else matrices[0])
            writer.close()
        finally:
            writer.abandon()
        places = {part: Place(tensor=n, entry=e) for n, parts in stacks.items() for e, part in enumerate(parts)}
        places |= {name: Place(tensor=name) for name in source.tensors if name not in inside}
        files = sorted(file.name for file in out.glob("*.safetensors"))
        return TensorIndex(files=files, tensors=dict(sorted(places.items())))

    def write_config(self, linears: Linears, config: QuantConfig | None) -> dict[str, Any]:
        own = {_module_path(name): _options(*layer) for name, layer in linears.layers.items()}
        everywhere = max(own.values(), key=list(own.values()).count)
        return {"quant_method": METHOD, **everywhere, **{path: o for path, o in own.items() if o != everywhere}}

    def complete_model_config(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Add the entry that MLX reads, and those that transformers 5 has renamed."""
        own, older = hf_config[OWN_KEY], _older_entries(hf_config)
        if older:
            own = {**own, ADDED_KEY: sorted(older)}
        others = {key: value for key, value in hf_config.items() if key != OWN_KEY}
        return {**others, **older, CONFIG_KEY: plain_config(own), OWN_KEY: own}

    def plain_model_config(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        said = hf_config.get(OWN_KEY)
        added = said.get(ADDED_KEY, ()) if isinstance(said, dict) and CONFIG_KEY in hf_config else ()
        dropped = {CONFIG_KEY, *(key for key in OLDER_KEYS if isinstance(added, list) and key in added)}
        return {key: value for key, value in hf_config.items() if key not in dropped}

    def read_config(
        self, where: str | Path, quantization: Mapping[str, Any], family: Sequence[FileFormat]
    ) -> Quantization:
        everywhere = _read_scheme(str(where), quantization)
        rules: list[tuple[str, Scheme | None]] = []
        for path, values in quantization.items():
            if isinstance(values, dict):
                own = _read_scheme(f"{where}, {path[:80]!r},", {"sym": everywhere.sym, **values})
                rules.append((_pattern(path), own))
        return Quantization(self.name, everywhere, tuple(rules))


# --- quantization_config ----------------------------------------------------------------------------------------------


def _options(scheme: Scheme, inputs: int) -> dict[str, Any]:
    """Return what config.json says of a layer."""
    return {"group_size": scheme.columns(inputs), "bits": scheme.bits, "mode": "affine", "sym": scheme.sym}


def _older_entries(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that mlx-lm reads and transformers 5 has renamed, as far as config.json lacks them.

    Without them most of mlx-lm's models take a default and compute something else.
    """
    rope = hf_config.get("rope_parameters")
    found: dict[str, Any] = {"num_experts": hf_config.get("num_local_experts")}
    if isinstance(rope, dict):
        everywhere, sliding = (rope.get(kind, rope) for kind in ("full_attention", "sliding_attention"))
        scaling = {key: value for key, value in everywhere.items() if key != "rope_theta"}
        found["rope_theta"] = everywhere.get("rope_theta")
        found["partial_rotary_factor"] = everywhere.get("partial_rotary_factor")
        if hf_config.get("model_type") == "gpt_neox":  # has names of its own
            found["rotary_pct"], found["rotary_emb_base"] = found["partial_rotary_factor"], found["rope_theta"]
        found["rope_scaling"] = None if scaling.get("rope_type") in (None, "default") else scaling
        found["rope_local_base_freq"] = None if sliding is everywhere else sliding.get("rope_theta")
    return {key: value for key, value in found.items() if value is not None and hf_config.get(key) is None}


def plain_config(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `quantization_config` without what MLX does not know."""
    return {key: _plain(value) for key, value in _plain(quantization).items()}


def _plain(values: Any) -> Any:
    return {k: v for k, v in values.items() if k not in OWN_KEYS} if isinstance(values, Mapping) else values


def _module_path(name: str) -> str:
    """Return what mlx-lm calls a layer: an expert's matrix is a part of a stack."""
    found = EXPERT.fullmatch(name)
    return f"{found[1]}.{STACK}.{STACKED_NAMES.get(found[3], found[3])}" if found else name


def _find_stacks(source: Source) -> dict[str, list[str]]:
    """Return the names of the tensors of each stack, in the order of the experts.

    Raises:
        InputError: the experts of a layer are not alike.
    """
    found: dict[str, dict[int, str]] = {}
    for name in source.tensors:
        layer, _, key = name.rpartition(".")
        if expert := EXPERT.fullmatch(layer):
            found.setdefault(f"{_module_path(layer)}.{key}", {})[int(expert[2])] = name
    for stack, parts in found.items():
        kinds = {source.tensors[name] for name in parts.values()}
        if sorted(parts) != list(range(len(parts))) or len(kinds) > 1:
            raise InputError(f"the experts' tensors that make up {stack} are not all there, or not of one kind")
    return {stack: [parts[number] for number in sorted(parts)] for stack, parts in found.items()}


def _pattern(path: str) -> str:
    """Return an expression that matches the layers of the checkpoint that mlx-lm calls by this path."""
    before, stack, name = path.rpartition(f".{STACK}.")
    if not stack:
        return f"{re.escape(path)}$"
    names = [name, *(own for own, theirs in STACKED_NAMES.items() if theirs == name)]
    return rf"{re.escape(before)}\.experts\.\d+\.(?:{'|'.join(map(re.escape, names))})$"


def _require_affine(mode: str) -> str:
    if mode != "affine":
        raise ValueError("mode")
    return mode


def _require_mlx_bits(bits: int) -> int:
    if bits not in MLX_BITS:
        raise ValueError("bits")
    return bits


def _require_mlx_group(size: int) -> int:
    if size not in MLX_GROUPS:
        raise ValueError("size")
    return size


class _Options(Options):
    bits: Annotated[int, AfterValidator(_require_mlx_bits)] = Field(description="MLX has 2, 3, 4, 5, 6 or 8")
    group_size: Annotated[int, AfterValidator(_require_mlx_group)] = Field(description="MLX has 32, 64 and 128")
    mode: Annotated[str, AfterValidator(_require_affine)] = Field("affine", description="the mode 'affine' is read")
    sym: bool = Field(False, description="it is true or false")  # only this package says so


def _read_scheme(where: str, values: Mapping[str, Any]) -> Scheme:
    read = read_options(_Options, values, where)
    return Scheme(read.bits, read.group_size, read.sym, Mlx.name)
