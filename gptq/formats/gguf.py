"""GGUF, the file of llama.cpp, Ollama and LM Studio: three formats, by which of ggml's block types they take.

A linear layer P with `out` outputs and `in` inputs is one tensor, P.weight_ggml (out, bytes of a row) uint8, with the
rows of blocks of `checkpoint.ggml`. Which type a layer has follows from its scheme. The finished folder holds them in
model.gguf under llama.cpp's names, and tensor_index.json says where (`formats.gguf_file`).

A block of the oldest types has 32 inputs and one scale, and holds GPTQ's integers exactly; a group of 64 repeats its
scale in two blocks. So smaller groups cost nothing.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from gptq.checkpoint.assembled import TensorIndex
from gptq.checkpoint.ggml import BLOCK_TYPES, Blocks, BlockType
from gptq.checkpoint.json_objects import Options, read_options
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.untrusted import read_json
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.formats import gguf_file, gguf_tokenizer
from gptq.formats.format import SCALE_DTYPE, FileFormat
from gptq.formats.gptq import dynamic_rules
from gptq.formats.name_rules import Quantization, check_expression
from gptq.formats.scheme import Linears, Scheme, contiguous_groups, most_common_scheme
from gptq.solver import Codes, Grid
from gptq.solver.grids.affine import AffineGrid
from gptq.solver.grids.table import IQ4_NL, TableGrid
from gptq.solver.grids.two_level import K_QUANTS, sub_scales
from gptq.version import __version__

METHOD = "gguf"
ROUNDED = "rounded"  # what quantization_config says of embeddings and heads that are rounded to `embedding_types`
KEY_BYTES = 4096  # an upper bound for the keys that describe the model


class Ggml(FileFormat):
    """What all formats in a GGUF file have in common."""

    quant_method = METHOD
    codes_key, scale_key, zero_key, g_idx_key = gguf_file.KEY, "", "", ""
    usage = ("import gptq", "", 'model = gptq.load("this folder")  # llama.cpp, Ollama and LM Studio load model.gguf')
    has_g_idx = False
    inputs_first = False
    needs_whole_words = False
    is_assembled = True
    keeps_scale_dtype = False

    @abstractmethod
    def find_type(self, scheme: Scheme) -> BlockType | None:
        """Return the type that stores layers with this scheme; None if the format has none."""

    @abstractmethod
    def to_blocks(self, layer: Codes, scheme: Scheme) -> Blocks:
        """Return the integers of a layer's blocks; raises ValueError if blocks cannot hold these integers."""

    @abstractmethod
    def to_codes(self, blocks: Blocks, scheme: Scheme) -> Codes:
        """Undo `to_blocks`."""

    def check_blocks(self, blocks: Blocks, scheme: Scheme) -> None:
        """Raise ValueError if blocks hold what `to_blocks` never returns."""

    def type_of(self, scheme: Scheme) -> BlockType:
        """Return the type that stores layers with a scheme that `refusal` has accepted.

        Raises:
            ValueError: there is none.
        """
        found = self.find_type(scheme)
        if found is None:
            raise ValueError(self._explain_no_type(scheme))
        return found

    def _explain_no_type(self, scheme: Scheme) -> str:
        return f"{self.name} has no type for {'symmetric' if scheme.sym else 'asymmetric'} {scheme.bits} bits"

    def refusal(self, scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
        kind, columns = self.find_type(scheme), scheme.columns(inputs)
        if transposed:
            return "llama.cpp's layers are nn.Linear, and this layer is a Conv1D"
        if scheme.scattered:
            return "llama.cpp has no g_idx, which act-order with dynamic groups needs"
        if kind is None:
            return self._explain_no_type(scheme)
        if inputs % kind.inputs:
            return f"{kind.name} has blocks of {kind.inputs} inputs, which do not divide the {inputs} inputs"
        if columns % kind.group or inputs % columns:
            return f"{kind.name} has groups of {kind.group} inputs or multiples of it, not of {columns}"
        return None

    def layout(
        self, scheme: Scheme, outputs: int, inputs: int, scale_dtype: torch.dtype = SCALE_DTYPE
    ) -> dict[str, TensorInfo]:
        return {gguf_file.KEY: TensorInfo(torch.uint8, (outputs, self.type_of(scheme).row_bytes(inputs)))}

    def encode(
        self, layer: Codes, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE, allow_zero: bool = False
    ) -> dict[str, Tensor]:
        return {gguf_file.KEY: self.type_of(scheme).pack(self.to_blocks(layer, scheme))}

    def decode(self, packed: Mapping[str, Tensor], scheme: Scheme) -> Codes:
        blocks = self.type_of(scheme).unpack(packed[gguf_file.KEY])
        self.check_blocks(blocks, scheme)
        return self.to_codes(blocks, scheme)

    def decode_shaped(self, packed: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Codes:
        return self.to_codes(self.type_of(scheme).unpack(packed[gguf_file.KEY]), scheme)

    def decode_groups(self, packed: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
        return contiguous_groups(scheme, inputs)

    def decode_zeros(self, packed: Mapping[str, Tensor], scheme: Scheme, outputs: int) -> Tensor:
        return self.decode(packed, scheme).zero

    def stored_shape(self, source: Source, layer: str, scheme: Scheme) -> tuple[int, int]:
        name, kind = f"{layer}.{gguf_file.KEY}", self.find_type(scheme)
        info = source.tensors[name]
        if kind is None or len(info.shape) != 2 or info.dtype != torch.uint8 or info.shape[1] % kind.nbytes:
            what = kind.name if kind else "no type of this format"
            raise InputError(f"{name} in {source.folder} has the shape {info.shape}, which are not blocks of {what}")
        inputs = info.shape[1] // kind.nbytes * kind.inputs
        reason = self.refusal(scheme, info.shape[0], inputs, transposed=False)
        if reason:
            raise InputError(f"{name} in {source.folder} cannot be what its quantization_config says: {reason}")
        return info.shape[0], inputs

    # --- the whole file ---

    is_source = False
    ignores_windows_of = frozenset({"mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})

    def model_refusal(self, folder: Path, tensors: Collection[str]) -> str | None:
        return gguf_file.explain_missing() or gguf_file.explain_unknown(folder, tensors)

    def file_bytes(self, tensors: dict[str, TensorInfo], folder: Path) -> int:
        rows = next((info.shape[0] for name, info in tensors.items() if name.endswith("embed_tokens.weight")), None)
        keys = KEY_BYTES + gguf_tokenizer.count_bytes(folder, rows)
        return keys + sum(self._stored_bytes(name, info) for name, info in tensors.items())

    def _stored_bytes(self, name: str, info: TensorInfo) -> int:
        """Return the bytes of a tensor in the file, with its entry in the header."""
        nbytes, header = info.nbytes, len(name) + 64
        if len(info.shape) == 1:
            nbytes = 4 * info.shape[0]
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            kind = self._embedding_type(info.shape[-1])
            nbytes = info.nbytes if kind is None else info.shape[0] * kind.row_bytes(info.shape[-1])
        return nbytes + header + 32  # alignment

    def _embedding_type(self, inputs: int) -> BlockType | None:
        kinds = (BLOCK_TYPES[name] for name in self.embedding_types)
        return next((kind for kind in kinds if inputs % kind.inputs == 0), None)

    def assemble(self, folder: Path, out: Path) -> TensorIndex | None:
        source, quantization = Source(folder), read_json(folder / "config.json")["quantization_config"]
        layers = [name.removesuffix(f".{gguf_file.KEY}") for name in source.tensors if name.endswith(gguf_file.KEY)]
        schemes = self.read_config(folder, quantization, [self]).schemes(layers)
        types = {layer: self.type_of(scheme) for layer, scheme in schemes.items() if scheme is not None}
        rounded = self.embedding_types if quantization.get("embeddings") == ROUNDED else ()
        return gguf_file.write_file(source, out, types, [BLOCK_TYPES[name] for name in rounded])

    # --- quantization_config ---

    def write_config(self, linears: Linears, config: QuantConfig | None) -> dict[str, Any]:
        everywhere = most_common_scheme(linears.layers)
        rules = dynamic_rules(everywhere, linears.layers, linears.kept)
        return {
            "quant_method": METHOD,
            "checkpoint_format": self.name,
            "bits": everywhere.bits,
            "group_size": everywhere.group_size,
            "sym": everywhere.sym,
            **({"embeddings": ROUNDED} if config and config.format == self.name else {}),
            **({"dynamic": rules} if rules else {}),
            "meta": {"quantizer": [f"gptq:{__version__}"]},
        }

    def read_config(
        self, where: str | Path, quantization: Mapping[str, Any], family: Sequence[FileFormat]
    ) -> Quantization:
        read = read_options(_Config, quantization, str(where))
        own = next((one.name for one in family if one.name == read.checkpoint_format), None)
        if own is None:
            known = " and ".join(repr(one.name) for one in family)
            raise InputError(
                f"{where} says checkpoint_format {read.checkpoint_format!r}; of GGUF files {known} are read"
            )
        rules: list[tuple[str, Scheme | None]] = []
        for rule, options in read.dynamic.items():
            pattern = rule[2:]
            check_expression(f"{where}, dynamic", pattern)
            given = {**quantization, **options}
            rules.append((pattern, None if rule.startswith("-:") else _read_scheme(f"{where}, {rule!r},", given, own)))
        return Quantization(own, _read_scheme(str(where), quantization, own), tuple(rules))


class Gguf(Ggml):
    """One float16 scale for 32 inputs: Q4_0 for 2 to 4 bits, Q5_0 for 5, Q8_0 for 6 to 8; with a minimum Q4_1, Q5_1."""

    name: Format = "gguf"
    embedding_types = ("Q8_0",)
    widths = (4, 5, 8)

    def find_type(self, scheme: Scheme) -> BlockType | None:
        symmetric = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
        names = symmetric if scheme.sym else {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1"}
        return BLOCK_TYPES.get(names.get(scheme.bits, ""))

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE) -> Grid:
        return super().grid(scheme) if scheme.sym else AffineGrid(scheme.bits)

    def to_blocks(self, layer: Codes, scheme: Scheme) -> Blocks:
        blocks = layer.codes.shape[1] // layer.scale.shape[1] // self.type_of(scheme).inputs  # of a group
        d = _to_float16(layer.scale, "scale").repeat_interleave(blocks, 1)
        if layer.offset is not None:
            return Blocks(layer.codes, d, _to_float16(layer.offset, "minimum").repeat_interleave(blocks, 1))
        middle = 2 ** (scheme.bits - 1)
        if bool((layer.zero != middle).any()):
            raise ValueError(f"a zero point is not {middle}")
        return Blocks(layer.codes + (self.type_of(scheme).offset - middle), d)

    def to_codes(self, blocks: Blocks, scheme: Scheme) -> Codes:
        inputs, groups = blocks.codes.shape[1], scheme.groups(blocks.codes.shape[1])
        scale = _first_of_each(blocks.d, groups)
        offset = None if blocks.m is None else _first_of_each(blocks.m, groups)
        zero = torch.full_like(scale, self._middle(scheme), dtype=torch.uint8)
        g_idx = contiguous_groups(scheme, inputs).to(scale.device)
        return Codes(self._shifted(blocks, scheme).to(torch.uint8), scale, zero, g_idx, offset=offset)

    def check_blocks(self, blocks: Blocks, scheme: Scheme) -> None:
        low, high = self._shifted(blocks, scheme).aminmax()
        if low < 0 or high >= 2**scheme.bits:
            worst = int(low if low < 0 else high) - self._middle(scheme)
            raise ValueError(f"a code is {worst}, which {scheme.bits} bits do not hold")
        for numbers in (blocks.d, blocks.m):
            if numbers is not None:
                _require_repeated(numbers, scheme.groups(blocks.codes.shape[1]))

    @staticmethod
    def _middle(scheme: Scheme) -> int:
        """The code that stands for 0; asymmetric layers have an offset instead."""
        return int(2 ** (scheme.bits - 1)) if scheme.sym else 0

    def _shifted(self, blocks: Blocks, scheme: Scheme) -> Tensor:
        """Codes (outputs, inputs) int16 of this width, from those of ggml's type, which may be wider."""
        return blocks.codes.to(torch.int16) - (self.type_of(scheme).offset - self._middle(scheme) if scheme.sym else 0)


class GgufK(Ggml):
    """The K-quants, whose scales are integers times a float16 that 256 inputs share: Q2_K to Q6_K, by bits."""

    name: Format = "gguf-k"
    embedding_types = ("Q6_K", "Q8_0")
    widths = (2, 3, 4, 5, 6)

    def find_type(self, scheme: Scheme) -> BlockType | None:
        return BLOCK_TYPES.get(f"Q{scheme.bits}_K")

    def adapt(self, scheme: Scheme) -> Scheme:
        grid = K_QUANTS.get(scheme.bits)
        return scheme if grid is None else replace(scheme, group_size=grid.columns, sym=grid.sym)

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE) -> Grid:
        return K_QUANTS[scheme.bits]

    def to_blocks(self, layer: Codes, scheme: Scheme) -> Blocks:
        kind = self.type_of(scheme)
        if layer.super_scale is None:
            raise ValueError("its scales are not multiples of one that 256 inputs share")
        scales = sub_scales(layer.scale, layer.super_scale)
        stored = scales if kind.name == "Q6_K" else (scales + kind.bias).to(torch.uint8)
        d = _to_float16(layer.super_scale, "scale")
        if layer.offset is None or layer.super_offset is None:
            return Blocks(layer.codes, d, scales=stored)
        mins = sub_scales(-layer.offset, layer.super_offset).to(torch.uint8)
        return Blocks(layer.codes, d, _to_float16(layer.super_offset, "minimum"), stored, mins)

    def to_codes(self, blocks: Blocks, scheme: Scheme) -> Codes:
        kind = self.type_of(scheme)
        groups = blocks.codes.shape[1] // kind.group // blocks.d.shape[1]  # of a block
        d, scales = blocks.d.float(), blocks.scales
        if scales is None:
            raise ValueError(f"blocks of {kind.name} have scales")
        scale = d.repeat_interleave(groups, 1) * (scales.float() - kind.bias)
        zero = torch.full_like(scale, kind.offset, dtype=torch.uint8)
        g_idx = contiguous_groups(scheme, blocks.codes.shape[1]).to(scale.device)
        if blocks.m is None or blocks.mins is None:
            return Codes(blocks.codes, scale, zero, g_idx, super_scale=d)
        m = blocks.m.float()
        offset = -(m.repeat_interleave(groups, 1) * blocks.mins.float())
        return Codes(blocks.codes, scale, zero, g_idx, offset=offset, super_scale=d, super_offset=m)


class GgufIq4(Ggml):
    """IQ4_NL: 4 bits that stand for 16 values, closer together near zero, and one float16 scale for 32 inputs."""

    name: Format = "gguf-iq4"
    embedding_types = ("Q8_0",)
    widths = (4,)

    def find_type(self, scheme: Scheme) -> BlockType | None:
        return BLOCK_TYPES["IQ4_NL"] if scheme.bits == 4 and scheme.sym else None

    def grid(self, scheme: Scheme, scale_dtype: torch.dtype = SCALE_DTYPE) -> Grid:
        return TableGrid(4, IQ4_NL)

    def to_blocks(self, layer: Codes, scheme: Scheme) -> Blocks:
        blocks = layer.codes.shape[1] // layer.scale.shape[1] // self.type_of(scheme).inputs  # of a group
        return Blocks(layer.codes, _to_float16(layer.scale, "scale").repeat_interleave(blocks, 1))

    def to_codes(self, blocks: Blocks, scheme: Scheme) -> Codes:
        inputs = blocks.codes.shape[1]
        scale = _first_of_each(blocks.d, scheme.groups(inputs))
        table = torch.tensor(IQ4_NL, dtype=torch.float32, device=scale.device)
        zero = torch.zeros_like(scale, dtype=torch.uint8)
        g_idx = contiguous_groups(scheme, inputs).to(scale.device)
        return Codes(blocks.codes, scale, zero, g_idx, table=table)

    def check_blocks(self, blocks: Blocks, scheme: Scheme) -> None:
        _require_repeated(blocks.d, scheme.groups(blocks.codes.shape[1]))


def _to_float16(numbers: Tensor, what: str) -> Tensor:
    """Return numbers as float16, which ggml's blocks hold; raises ValueError if one is no float16."""
    halves = numbers.to(torch.float16)
    if not torch.equal(halves.float(), numbers.float()):
        raise ValueError(f"a {what} is not a float16, which ggml's blocks hold")
    return halves


def _first_of_each(numbers: Tensor, groups: int) -> Tensor:
    """Return the number (outputs, groups) that all blocks of a group have, from (outputs, blocks)."""
    first: Tensor = numbers.unflatten(1, (groups, -1))[..., 0]
    return first.contiguous()


def _require_repeated(numbers: Tensor, groups: int) -> None:
    """Raise ValueError if the blocks of a group have different numbers."""
    each = numbers.unflatten(1, (groups, -1))  # (outputs, groups, blocks of a group)
    if bool((each.view(torch.int16) != each[..., :1].view(torch.int16)).any()):
        raise ValueError("the blocks of a group have different scales")


# --- quantization_config ----------------------------------------------------------------------------------------------


def _require_bits(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError("width")
    return bits


def _require_group_size(size: int) -> int:
    if size != -1 and size < 1:
        raise ValueError("size")
    return size


def _require_rules(rules: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if not all(rule.startswith(("+:", "-:")) for rule in rules):
        raise ValueError("rule")
    return rules


class _SchemeOptions(Options):
    bits: Annotated[int, AfterValidator(_require_bits)] = Field(description="it is 2 to 8")
    group_size: Annotated[int, AfterValidator(_require_group_size)] = Field(
        description="it is -1 or a number of columns"
    )
    sym: bool = Field(description="it is true or false")


class _Config(Options):
    checkpoint_format: str = Field(description="it is the name of a format")
    dynamic: Annotated[
        dict[str, dict[str, Any]], BeforeValidator(lambda rules: rules or {}), AfterValidator(_require_rules)
    ] = Field({}, description="it holds rules by expression, each an object of options")


def _read_scheme(where: str, values: Mapping[str, Any], name: Format) -> Scheme:
    read = read_options(_SchemeOptions, values, where)
    return Scheme(read.bits, read.group_size, read.sym, name)
