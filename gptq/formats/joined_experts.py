"""Write experts under the names that an engine reads where its loader of a model knows no single matrices of experts.

An engine that computes with gate and up in one matrix may read them so too: two matrices of an expert are then one
tensor of the file, with their rows in turn. config.json names the single matrices all the same, as such engines do when
they look up how experts are quantized.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq.checkpoint.assembled import Place, TensorIndex
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.untrusted import read_json
from gptq.checkpoint.writer import ShardWriter
from gptq.formats.scheme import Layers, normalized_scheme

MATRIX = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)$")  # a matrix of an expert, as checkpoints call it


@dataclass(frozen=True)
class Joined:
    """The names by which an engine reads the experts of a model, and which matrices share a tensor."""

    engine: str
    stored: Mapping[str, tuple[str, int | None]]  # matrix -> name in the file, and the first of its rows if in turn
    keys: Mapping[str, str]  # key of a matrix's tensor -> what follows the name in the file; others keep their names


JOINED: Mapping[str, Joined] = {  # model_type -> rule
    # vLLM 0.32.0, models/gpt_oss.py: _GPT_OSS_STREAMED_EXPERT_SUFFIX_TO_SHARD and GptOssRoutedExperts for the names;
    # fused_moe/activation.py, SWIGLUOAI, for the rows. A tensor called w13_weight_shape would end the loading.
    "gpt_oss": Joined(
        "vLLM",
        {"gate_proj": ("w13", 0), "up_proj": ("w13", 1), "down_proj": ("w2", None)},
        {"weight_packed": "_weight_packed", "weight_scale": "_weight_scale", "bias": "_bias"},
    ),
}


def explain_apart(layers: Layers, rule: Joined) -> str | None:
    """Return why experts that are quantized like this are not written, or not read, by the names of a rule; or None."""
    found: dict[str, dict[tuple[int, str], str]] = {}
    for name in layers:
        if matrix := MATRIX.fullmatch(name):
            found.setdefault(matrix[1], {})[int(matrix[2]), matrix[3]] = name
    for experts, matrices in found.items():
        count = 1 + max(number for number, _ in matrices)
        if matrices.keys() != {(number, part) for number in range(count) for part in rule.stored}:
            return f"{rule.engine} needs every expert of {experts} quantized"
        kinds = {normalized_scheme(*layers[name]) for name in matrices.values()}
        if len(kinds) > 1 or not all(kind.sym for kind in kinds):
            return f"{rule.engine} reads these experts with one symmetric scheme for a layer, which {experts} has not"
    return None


def join_experts(folder: Path, out: Path, keys: Collection[str]) -> TensorIndex | None:
    """Write a finished folder's tensors into `out` by the rule for its model; None if there is none, or it cannot.

    Args:
        keys: of a packed matrix's tensors; others belong to a scheme that the rule does not describe.
    """
    rule = JOINED.get(str(read_json(folder / "config.json").get("model_type")))
    if rule is None:
        return None
    source = Source(folder)
    places = _place(source.tensors, rule, {*keys, "bias"})
    if not places:
        return None
    parts: dict[str, list[str]] = {}
    for name in source.tensors:
        places.setdefault(name, Place(tensor=name))
        parts.setdefault(places[name].tensor, []).append(name)
    for names in parts.values():
        names.sort(key=lambda name: places[name].alternate or 0)
    writer = ShardWriter(out, {stored: _joined_info(source, names) for stored, names in parts.items()})
    try:
        for stored, names in parts.items():
            writer.write(stored, alternate([source.read_unchecked(name) for name in names]))
        writer.close()
    finally:
        writer.abandon()
    files = sorted(file.name for file in out.glob("*.safetensors"))
    return TensorIndex(files=files, tensors=dict(sorted(places.items())))


def alternate(tensors: Iterable[Tensor]) -> Tensor:
    """Return tensors (rows, ...) with their rows in turn: row i of tensor j of n becomes row n i + j."""
    return torch.stack([*tensors], 1).flatten(0, 1).contiguous()


def _joined_info(source: Source, names: list[str]) -> TensorInfo:
    info = source.tensors[names[0]]
    return TensorInfo(info.dtype, (len(names) * info.shape[0], *info.shape[1:])) if len(names) > 1 else info


def _place(tensors: Mapping[str, TensorInfo], rule: Joined, keys: Collection[str]) -> dict[str, Place]:
    """Return the places of the experts' tensors that get other names; empty if a matrix is not as the rule needs it."""
    places: dict[str, Place] = {}
    kinds: dict[str, set[TensorInfo]] = {}
    parts: dict[str, set[str]] = {}  # by expert and key: its matrices
    for name, info in tensors.items():
        layer, _, key = name.rpartition(".")
        matrix = MATRIX.fullmatch(layer)
        if matrix is None:
            continue
        if matrix[3] not in rule.stored or key not in keys:
            return {}
        parts.setdefault(f"{matrix[1]}.{matrix[2]}.{key}", set()).add(matrix[3])
        if key in rule.keys:
            short, first = rule.stored[matrix[3]]
            stored = f"{matrix[1]}.{matrix[2]}.{short}{rule.keys[key]}"
            place = Place(tensor=stored) if first is None else Place(tensor=stored, alternate=first)
            places[name] = place
            kinds.setdefault(place.tensor, set()).add(info)
    whole = all(found == rule.stored.keys() for found in parts.values())
    return places if whole and all(len(found) == 1 for found in kinds.values()) else {}
