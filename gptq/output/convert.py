"""Write a quantized checkpoint in another format: the same integers and scales, bit for bit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptq import formats
from gptq.checkpoint.assembled import AssembledSource, open_source
from gptq.checkpoint.atomic_folder import atomic_folder
from gptq.checkpoint.companions import note_on_left_out
from gptq.checkpoint.hub import resolve
from gptq.checkpoint.reader import Source
from gptq.checkpoint.source_state import SourceState
from gptq.checkpoint.tensors import TensorInfo, sha256
from gptq.checkpoint.writer import ShardWriter
from gptq.compute.torch_state import fresh_torch_state
from gptq.config import Format
from gptq.errors import InputError
from gptq.formats.packed_layers import PackedLayer, is_variant, match_layers, packed_layers, read_packed
from gptq.formats.quantization_config import TRANSLATED, method_of, quantization_of, read_quantization, translated
from gptq.formats.scheme import Linears, Scheme
from gptq.models.blocks import find_blocks, is_transposed
from gptq.models.build import open_model
from gptq.models.check_tensors import check_tensors
from gptq.output.files import quantization_config, unquantized_linears, write_files
from gptq.output.record import LayerRecord, OriginRecord, Record, WrittenRecord, model_name, read_record
from gptq.output.results import RECORD
from gptq.planning.choose_format import refuse_model


@dataclass(frozen=True)
class Converted:
    """Result of a conversion; sizes are bytes of the files with tensors."""

    out: str
    format: Format
    layers: int
    notes: list[str]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@fresh_torch_state()
def convert(
    model: str | Path,
    out: str | Path,
    chosen: Format,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Write a quantized checkpoint of any tool in another format into a new folder; nothing is requantized.

    Converting the result back gives the same bytes; but for a perplexity in the record, which a format that rounds
    activations does not have in common with one that does not. Scales keep their dtype.

    Args:
        model: folder or Hub id.
        progress: called after each layer with the number of finished layers and the number of all layers.
    Raises:
        InputError: the checkpoint cannot be read, or the format cannot hold one of its layers, which the message names.
    """
    folder = resolve(str(model), revision)
    state = SourceState.of(folder)
    plan = _plan_conversion(model, folder, chosen, trust_remote_code)
    source, record, shards = plan.source, plan.record, _plan_shards(plan.source, plan.layers)
    tensors = {name: info for shard in shards for name, info in shard.items()}
    refuse_model(model, folder, tensors, chosen)
    names = None if isinstance(source, AssembledSource) else [list(shard) for shard in shards]
    with atomic_folder(Path(out), formats.FORMATS[chosen].disk_bytes(tensors, folder)) as partial_out:
        writer = ShardWriter(partial_out, tensors, shards=names)
        try:
            checksums = _write_tensors(plan, writer, progress)
            writer.close()
        finally:
            writer.abandon()
        if not record.layers:
            record = record.model_copy(update={"layers": _layer_records(plan, checksums)})
        after = write_files(folder, partial_out, chosen, plan.linears, record, writer.checksums)
        state.require_same()
    notes = [*_note_scale_dtypes(plan.layers), *note_on_left_out(folder, {file.name for file in source.files})]
    return Converted(str(out), chosen, len(plan.layers), notes, source.file_bytes, after)


LayerPlans = dict[str, tuple[PackedLayer, Scheme]]  # by stored name: how a layer is stored, and its new scheme


@dataclass(frozen=True)
class _Conversion:
    """A checkpoint, and how it will be written in another format."""

    source: Source
    model_names: dict[str, str]  # names of layers in the model, by their stored names
    layers: LayerPlans
    linears: Linears
    record: Record
    written: WrittenRecord | None  # the folder's own record
    is_restored: bool  # the file was converted from this format before, and gets its old bytes and config back


def _plan_conversion(model: str | Path, folder: Path, chosen: Format, trust_remote_code: bool) -> _Conversion:
    quantization = quantization_of(folder)
    if quantization is None:
        raise InputError(f"{model} is not a quantized checkpoint: its config.json has no quantization_config")
    read = read_quantization(folder / "config.json", quantization)
    opened = open_model(open_source(folder), trust_remote_code)
    source, network, names = opened.source, opened.network, opened.names
    packed = packed_layers(source, read)
    if read.format == chosen and not is_variant(quantization, packed):
        raise InputError(f"{model} is in the format {chosen!r} already")
    stored = match_layers(network, names, source, packed)
    check_tensors(network, names, source.tensors, stored)

    wanted: dict[str, Scheme] = {}
    for name, own in stored.items():
        transposed = is_transposed(network.get_submodule(name))
        wanted[own] = _target_scheme(source, own, packed[own], chosen, transposed)
    layers = {own: (scheme, packed[own].inputs) for own, scheme in wanted.items()}
    reason = formats.FORMATS[chosen].layers_refusal(layers)
    if reason:
        raise InputError(f"{model} cannot be written as {chosen!r}: {reason}")
    linears = Linears(layers, *unquantized_linears(network, names, find_blocks(network), stored))
    record = inherit_record(model, folder)
    rounding = {formats.FORMATS[layer.scheme.format].activation_bits for layer in packed.values()}
    if rounding != {formats.FORMATS[chosen].activation_bits}:  # other activations give another perplexity
        record = record.without_perplexity()
    is_restored = record.origin is not None and record.origin.format == chosen
    plans = _plan_layers(packed, wanted, quantization_config(chosen, linears, record))
    if formats.FORMATS[chosen].zero_offset and not is_restored:
        _refuse_zero_points_of_0(source, plans)
    linears = replace(linears, layers={own: (scheme, packed[own].inputs) for own, (_, scheme) in plans.items()})
    model_names = {own: name for name, own in stored.items()}
    written = read_record(folder) if (folder / RECORD).is_file() else None
    return _Conversion(source, model_names, plans, linears, record, written, is_restored)


def _plan_layers(packed: dict[str, PackedLayer], wanted: dict[str, Scheme], config: dict[str, Any]) -> LayerPlans:
    """Pair each layer with the scheme that readers of the new `quantization_config` assign to the layer."""
    schemes = read_quantization("the new config.json", config).schemes(wanted)
    return {
        own: (packed[own], _require_same_scheme(schemes[own], scheme, own, packed[own].inputs))
        for own, scheme in wanted.items()
    }


def _target_scheme(source: Source, name: str, layer: PackedLayer, chosen: Format, transposed: bool) -> Scheme:
    """Choose the scheme that stores a layer in the new format.

    Raises:
        InputError: the new format cannot hold the layer.
    """
    scheme = replace(layer.scheme, format=chosen, by_gptqmodel=False)
    if scheme.scattered and not formats.FORMATS[chosen].has_g_idx:
        g_idx = formats.decode_groups(read_packed(source, name, layer, with_codes=False), layer.scheme, layer.inputs)
        scheme = replace(scheme, scattered=not torch.equal(g_idx, formats.contiguous_groups(scheme, layer.inputs)))
    reason = formats.refusal(scheme, layer.outputs, layer.inputs, transposed)
    if reason:
        raise InputError(f"{name} cannot be written as {chosen!r}: {reason}")
    if not formats.FORMATS[chosen].takes_grid(formats.FORMATS[layer.scheme.format].grid(layer.scheme), scheme):
        why = f"{layer.scheme.format!r} rounds to other values; quantize the original with --format {chosen}"
        raise InputError(f"{name} cannot be written as {chosen!r}: {why}")
    return scheme


def _require_same_scheme(written: Scheme | None, wanted: Scheme, name: str, inputs: int) -> Scheme:
    """Return the scheme that a reader of the new configuration assigns to a layer, if it is as wanted."""
    if written is None or any(
        (
            (written.bits, written.sym, written.format) != (wanted.bits, wanted.sym, wanted.format),
            written.columns(inputs) != wanted.columns(inputs),
            wanted.scattered and not written.scattered and wanted.columns(inputs) < inputs,
        )
    ):
        raise InputError(f"{name} would be read back as {written}, not {wanted}")
    return written


def _refuse_zero_points_of_0(source: Source, plans: LayerPlans) -> None:
    for name, (layer, scheme) in plans.items():
        if not scheme.sym and not int(formats.decode(read_packed(source, name, layer), layer.scheme).zero.min()):
            raise InputError(
                f"{name} has a zero point of 0, which GPTQ v1 stores as -1, about which its readers disagree; "
                "convert to 'gptq_v2' or 'pack-quantized'"
            )


def inherit_record(model: str | Path, folder: Path) -> Record:
    """Copy the folder's record, or without a record note which tool made the folder and what its config said.

    A config in the words of another format (`TRANSLATED`) is not noted: it cannot be that of a file in this one.
    """
    if (folder / RECORD).is_file():
        return read_record(folder).without_checksums()
    quantization = quantization_of(folder) or {}
    own = translated(folder / "config.json", quantization)
    meta = own.get("meta")
    maker = meta.get("quantizer") if isinstance(meta, dict) else None
    made_by = ", ".join(map(str, maker)) if isinstance(maker, list) else maker or own.get("quant_method")
    record = Record(
        model=model_name(model),
        config=None,
        calibration=None,
        layers=[],
        made_by=None if made_by is None else str(made_by),
    )
    if method_of(quantization) in TRANSLATED:
        return record
    return record.model_copy(
        update={
            "origin": OriginRecord(
                format=read_quantization(folder / "config.json", quantization).format, quantization_config=quantization
            )
        }
    )


def _plan_shards(source: Source, plans: LayerPlans) -> list[dict[str, TensorInfo]]:
    """List the new tensors by shard: a layer's new tensors take the place of its old tensors in the source's shards."""
    shards: dict[str, dict[str, TensorInfo]] = {}
    of_layers = {f"{name}.{suffix}": name for name, (layer, _) in plans.items() for suffix in layer.suffixes}
    done: set[str] = set()
    for name, info in source.tensors.items():
        shard = shards.setdefault(source.file_of(name).name, {})
        own = of_layers.get(name)
        if own is None:
            shard[name] = info
        elif name.rpartition(".")[2] in {known.codes_key for known in formats.FORMATS.values()} and own not in done:
            layer, scheme = plans[own]
            layout = formats.layout(scheme, layer.outputs, layer.inputs, layer.scale_dtype)
            shard |= {f"{own}.{suffix}": packed for suffix, packed in layout.items()}
            done.add(own)
    return [shard for _, shard in sorted(shards.items()) if shard]


def _write_tensors(plan: _Conversion, writer: ShardWriter, progress: Callable[[int, int], None]) -> dict[str, str]:
    """Write every tensor; returns the checksums of the layers' weights."""
    source = plan.source
    recorded = {layer.stored: layer.weight_sha256 for layer in plan.record.layers}
    checksums: dict[str, str] = {}
    for name, (layer, scheme) in plan.layers.items():
        codes = formats.decode(read_packed(source, name, layer), layer.scheme)
        checksums[name] = sha256(codes.weight())
        if recorded.get(name, checksums[name]) != checksums[name]:
            raise InputError(f"{name} does not unpack to the weight that was chosen for it; see `gptq verify`")
        try:
            packed = formats.encode(codes, scheme, layer.scale_dtype, allow_zero=plan.is_restored)
        except ValueError as problem:
            raise InputError(f"{name} cannot be written as {scheme.format!r}: {problem}") from problem
        for suffix, tensor in packed.items():
            writer.write(f"{name}.{suffix}", tensor)
        progress(len(checksums), len(plan.layers))
    for name in source.tensors:
        if name in writer.checksums and not writer.checksums[name]:
            writer.write(name, source.read(name))
            _require_as_recorded(plan, name, writer.checksums[name])
    return checksums


def _require_as_recorded(plan: _Conversion, name: str, checksum: str) -> None:
    """Raises InputError if a tensor that is copied is not the one that was written with the record."""
    if plan.written is None or name not in plan.written.tensors:
        return
    now = str(plan.source.tensors[name])
    if (plan.written.tensors[name], (plan.written.layout or {}).get(name, now)) != (checksum, now):
        where = plan.source.file_of(name)
        raise InputError(f"{name} in {where} was changed after it was written; see `gptq verify`")


def _layer_records(plan: _Conversion, checksums: dict[str, str]) -> list[LayerRecord]:
    """Make records of layers that another tool quantized; their errors are not known."""
    return [
        LayerRecord(
            name=plan.model_names[own],
            stored=own,
            bits=scheme.bits,
            group_size=scheme.columns(layer.inputs),
            error=None,
            rtn_error=None,
            damp=None,
            tokens=None,
            weight_sha256=checksums[own],
        )
        for own, (layer, scheme) in plan.layers.items()
    ]


def _note_scale_dtypes(plans: LayerPlans) -> list[str]:
    other = {str(layer.scale_dtype).removeprefix("torch.") for layer, _ in plans.values()} - {"float16"}
    scheme = next(iter(plans.values()))[1]
    if not other or formats.FORMATS[scheme.format].keeps_scale_dtype:
        return []
    return [f"scales stay {other.pop()}, as they were chosen; readers that hold float16 round them"]
