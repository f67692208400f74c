"""Assemble a GGUF file from the tensors of a finished folder: names, order of rows, stacks of experts, tokenizer.

The package `gguf` writes the file and knows llama.cpp's names of tensors; it is needed for writing alone.
"""

import importlib.util
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gptq.checkpoint.assembled import Place, TensorIndex, interleave
from gptq.checkpoint.ggml import BlockType
from gptq.checkpoint.gguf import PLAIN_TYPES
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import DTYPE_CODES, TensorInfo, tensor_bytes
from gptq.errors import InputError
from gptq.formats import gguf_architectures, gguf_tokenizer
from gptq.formats.gguf_rounding import round_rows
from gptq.models.hf_config import read_config

FILE, KEY = "model.gguf", "weight_ggml"  # name of the file, and key of a layer's rows of blocks
NUMBER_OF = {dtype: number for number, dtype in PLAIN_TYPES.items()}
FILE_TYPES = {  # what general.file_type calls a file most of whose blocks are of a type; it is shown to people
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
    "IQ4_NL": 25,
}  # fmt: skip
QUANTIZATION_VERSION = 2  # of the block types; ggml has had no other since 2023
EMBEDDINGS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, and its place in the file."""

    name: str
    place: Place


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file: its type, and the tensors of the checkpoint that it is made of."""

    name: str
    number: int  # ggml's number of the type
    shape: tuple[int, ...]  # of the bytes for packed types, of the numbers for others
    parts: tuple[Part, ...]
    blocks: BlockType | None = None  # to which the values are rounded while they are written

    @property
    def nbytes(self) -> int:
        size = 1 if self.number not in PLAIN_TYPES else PLAIN_TYPES[self.number].itemsize
        return size * torch.Size(self.shape).numel()


def explain_missing() -> str | None:
    """Return what to install if the package that writes GGUF files is not there."""
    found = importlib.util.find_spec("gguf") and importlib.util.find_spec("gguf.gguf_writer")
    return None if found else "GGUF files need one more package: pip install 'gptq[gguf]'"


def explain_unknown(folder: Path, tensors: Collection[str]) -> str | None:
    """Return why llama.cpp would not run the model in `folder`, or why a tensor has no place in its file; or None."""
    config = read_config(folder, trust_remote_code=False)
    reason = gguf_architectures.explain_unknown(config) or gguf_tokenizer.explain_unknown(folder)
    if reason:
        return reason
    try:
        _place_all(dict.fromkeys(tensors), config)
    except InputError as error:
        return str(error)
    return None


def write_file(
    source: Source, out: Path, types: Mapping[str, BlockType], embedding: Sequence[BlockType]
) -> TensorIndex:
    """Write a checkpoint as `out`/model.gguf.

    Args:
        types: block type of each packed layer, by its name in the checkpoint.
        embedding: types to which an embedding and an output head are rounded, the first that fits; without any, their
            numbers stay as they are.
    """
    config = read_config(source.folder, trust_remote_code=False)
    tensors = _list_tensors(source, config, types, embedding)
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(out / FILE, gguf_architectures.ARCHITECTURES[config.model_type].name)
    rows = next(source.tensors[t.parts[0].name].shape[0] for t in tensors if t.name == EMBEDDINGS[0])
    _add_keys(writer, source.folder, config, types.values(), rows)
    extra = gguf_architectures.extra_tensors(config)
    for name, values in extra.items():
        writer.add_tensor_info(name, tuple(values.shape), values.numpy().dtype, values.nbytes)
    for one in tensors:
        writer.add_tensor_info(one.name, *_info(one), raw_dtype=GGMLQuantizationType(one.number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values.numpy())
    for one in tensors:
        writer.write_tensor_data(_read(source, one))
    writer.close()
    return TensorIndex(files=[FILE], tensors={part.name: part.place for one in tensors for part in one.parts})


def _add_keys(writer: Any, folder: Path, config: PreTrainedConfig, types: Iterable[BlockType], rows: int) -> None:
    names = [kind.name for kind in types]
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(FILE_TYPES[max(FILE_TYPES, key=names.count)])
    own = ((f"{writer.arch}.{key}", value) for key, value in gguf_architectures.list_keys(config))
    words = ((f"tokenizer.{key}", value) for key, value in gguf_tokenizer.list_keys(folder, rows))
    for key, value in (*own, *words):
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _info(one: FileTensor) -> tuple[tuple[int, ...], Any, int]:
    """Return shape, dtype and bytes of a tensor as `add_tensor_info` wants them: bytes where numpy lacks the type."""
    import numpy as np

    if one.number not in PLAIN_TYPES:
        return one.shape, np.dtype(np.uint8), one.nbytes
    *rows, columns = one.shape
    return (*rows, columns * PLAIN_TYPES[one.number].itemsize), np.dtype(np.uint8), one.nbytes


# --- where each tensor goes -------------------------------------------------------------------------------------------


def _place_all(tensors: Mapping[str, TensorInfo | None], config: PreTrainedConfig) -> dict[str, list[Part]]:
    """Return the tensors of the checkpoint that make up each tensor of the file, by its name.

    Raises:
        InputError: llama.cpp has no tensor for one of the checkpoint, or a stack of experts has gaps.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = gguf_architectures.ARCHITECTURES[config.model_type]
    arch = next(number for number, name in MODEL_ARCH_NAMES.items() if name == kind.name)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    found: dict[str, list[Part]] = {}
    for name, info in tensors.items():
        layer, _, key = name.rpartition(".")
        expert = gguf_architectures.EXPERT.match(layer)
        own = f"{expert[1]}.{expert[3]}" if expert else layer
        stored = names.get_name(own) or names.get_name(f"model.{own}")
        suffix = "weight" if key == KEY else key
        if stored is None or suffix not in ("weight", "bias"):
            raise InputError(f"llama.cpp has no tensor for {name} in a model of type {config.model_type!r}")
        heads = gguf_architectures.heads_of(layer, config)
        shift = kind.norm_shift if layer.endswith("norm") else 0.0
        place: dict[str, Any] = {"tensor": f"{stored}.{suffix}"}
        if expert:
            place["entry"] = int(expert[2])
        if heads:
            place["heads"] = heads
        if shift:
            place["added"] = shift
        if info is not None and info.dtype.is_floating_point:
            place["dtype"] = DTYPE_CODES[info.dtype]
        found.setdefault(place["tensor"], []).append(Part(name, Place(**place)))
    for stored, parts in found.items():
        entries = sorted(part.place.entry or 0 for part in parts)
        keys = {part.name.rpartition(".")[2] for part in parts}
        if entries != list(range(len(parts))) or len(keys) > 1:
            raise InputError(
                f"{parts[0].name} and its like do not make up {stored}: an expert is missing, or not packed"
            )
    return found


def _list_tensors(
    source: Source, config: PreTrainedConfig, types: Mapping[str, BlockType], embedding: Sequence[BlockType]
) -> list[FileTensor]:
    """Return the tensors of the file.

    Raises:
        InputError: experts that llama.cpp stacks have different types.
    """
    tensors = []
    for stored, parts in _place_all(source.tensors, config).items():
        parts.sort(key=lambda part: part.place.entry or 0)
        infos = [source.tensors[part.name] for part in parts]
        kinds = {types.get(part.name.rpartition(".")[0]) if part.name.endswith(KEY) else None for part in parts}
        if len({(info.dtype, info.shape) for info in infos}) > 1 or len(kinds) > 1:
            raise InputError(f"{parts[0].name} and its like are stored differently, and llama.cpp stacks them")
        shape = infos[0].shape if parts[0].place.entry is None else (len(parts), *infos[0].shape)
        tensors.append(_describe(stored, tuple(parts), infos[0].dtype, shape, kinds.pop(), embedding))
    return tensors


def _describe(
    stored: str, parts: tuple[Part, ...], dtype: torch.dtype, shape: tuple[int, ...], kind: BlockType | None,
    embedding: Sequence[BlockType],
) -> FileTensor:  # fmt: skip
    if kind is not None:
        return FileTensor(stored, kind.number, shape, parts)
    rounding = next((one for one in embedding if shape[-1] % one.inputs == 0), None)
    if stored in EMBEDDINGS and rounding is not None:
        rounded = tuple(Part(part.name, part.place.model_copy(update={"dtype": "F32"})) for part in parts)
        byte_shape = (*shape[:-1], rounding.row_bytes(shape[-1]))
        return FileTensor(stored, rounding.number, byte_shape, rounded, rounding)
    small = len(shape) == 1 or stored.endswith(("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"))
    return FileTensor(stored, NUMBER_OF[torch.float32 if small else dtype], shape, parts)


def _read(source: Source, one: FileTensor) -> Any:
    """Return a tensor of the file as numpy's bytes."""
    import numpy as np

    read = [_read_part(source, part, one) for part in one.parts]
    whole = read[0] if one.parts[0].place.entry is None else torch.stack(read)
    return np.frombuffer(tensor_bytes(whole), dtype=np.uint8)


def _read_part(source: Source, part: Part, one: FileTensor) -> Tensor:
    tensor, place = source.read_unchecked(part.name), part.place
    if one.blocks is not None:
        return round_rows(tensor.float(), one.blocks)
    if one.number in PLAIN_TYPES:
        tensor = tensor.to(PLAIN_TYPES[one.number])
    if place.added:
        tensor = tensor + place.added
    return interleave(tensor, place.heads) if place.heads else tensor
