"""Write a quantized checkpoint again with other scales and other small tensors; every code stays as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gptq import formats
from gptq.checkpoint.assembled import AssembledSource
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import sha256
from gptq.checkpoint.writer import ShardWriter
from gptq.formats.packed_layers import PackedLayer, match_layers, packed_layers
from gptq.formats.quantization_config import quantization_of, read_quantization
from gptq.formats.scheme import Linears
from gptq.models.blocks import find_blocks
from gptq.models.build import OpenModel
from gptq.output.files import unquantized_linears, write_files
from gptq.output.record import Record
from gptq.solver.codes import Codes


@dataclass(frozen=True)
class PackedCheckpoint:
    """A quantized checkpoint and its packed layers."""

    source: Source
    layers: dict[str, PackedLayer]  # by stored name
    stored: dict[str, str]  # names of layers in the checkpoint, by their names in the model
    linears: Linears


def describe_packed(opened: OpenModel) -> PackedCheckpoint:
    """Find the packed layers of an opened checkpoint; raises InputError if it is not quantized, or damaged."""
    source, network, names = opened.source, opened.network, opened.names
    layers = packed_layers(
        source, read_quantization(source.folder / "config.json", quantization_of(source.folder) or {})
    )
    stored = match_layers(network, names, source, layers)
    schemes = {own: (layers[own].scheme, layers[own].inputs) for own in stored.values()}
    return PackedCheckpoint(
        source, layers, stored, Linears(schemes, *unquantized_linears(network, names, find_blocks(network), stored))
    )


def rewrite(
    checkpoint: PackedCheckpoint, out: Path, codes: Mapping[str, Codes], tensors: Mapping[str, Tensor], record: Record
) -> int:
    """Write the checkpoint into an empty folder with what has changed; return the bytes of its files with tensors.

    Args:
        codes: of the layers whose scales have changed, by stored name.
        tensors: others that have changed, by stored name, in their stored dtype.
        record: of the checkpoint; the checksums of the changed weights are replaced.
    """
    source = checkpoint.source
    shards: dict[str, list[str]] = {}
    for name in source.tensors:
        shards.setdefault(source.file_of(name).name, []).append(name)
    names = None if isinstance(source, AssembledSource) else [own for _, own in sorted(shards.items())]
    writer = ShardWriter(out, dict(source.tensors), shards=names)
    changed = dict(tensors)
    try:
        for own, new in codes.items():
            layer = checkpoint.layers[own]
            packed = formats.encode(new, layer.scheme, layer.scale_dtype)
            changed |= {f"{own}.{suffix}": packed[suffix] for suffix in layer.suffixes}
        for name in source.tensors:
            writer.write(name, changed[name] if name in changed else source.read_unchecked(name))
        writer.close()
    finally:
        writer.abandon()
    checksums = {own: sha256(new.weight()) for own, new in codes.items()}
    layers = [
        one.model_copy(update={"weight_sha256": checksums.get(one.stored, one.weight_sha256)}) for one in record.layers
    ]
    scheme, _ = next(iter(checkpoint.linears.layers.values()))
    return write_files(
        source.folder, out, scheme.format, checkpoint.linears, record.model_copy(update={"layers": layers}),
        writer.checksums,
    )  # fmt: skip
