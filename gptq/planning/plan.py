"""Plan a run from headers and config.json: the layers to quantize, their options, and every tensor of the result."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gptq import formats
from gptq.checkpoint.companions import note_on_left_out, refuse_adapter
from gptq.checkpoint.hub import resolve
from gptq.checkpoint.reader import Source
from gptq.checkpoint.source_state import SourceState
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.formats.original import open_original
from gptq.formats.scheme import Layers
from gptq.models.blocks import Block, find_blocks, find_gates, find_head, is_transposed, shape_of
from gptq.models.build import OpenModel, check_untied, open_model
from gptq.models.check_tensors import check_tensors
from gptq.models.forward import accepted_inputs, text_inputs
from gptq.models.reached_layers import find_uncalled_layers, find_unreached_layers
from gptq.models.tensor_names import Names
from gptq.models.tensor_use import find_used_tensors, notes_on_unused
from gptq.models.trial_forward import Trial, run_trial
from gptq.planning.choose_format import choose_format, layers_refusal, refuse_model
from gptq.planning.layer_plan import LayerPlan
from gptq.planning.overrides import find_asked_for, is_named, resolve_layer_options
from gptq.planning.plan_notes import (
    abbreviate,
    note_on_group_size,
    note_on_uncalled,
    notes_on_repeats,
    notes_on_shapes,
    notes_on_unreached,
)
from gptq.planning.result_tensors import list_result_tensors

PROBE_TOKENS = 8  # tokens of the window that is run on the meta device to find out which layers are called


@dataclass(frozen=True)
class Plan:
    """A checkpoint, its model on the meta device, and what happens to each of its tensors."""

    folder: Path
    source: Source
    hf_config: PreTrainedConfig
    network: PreTrainedModel
    names: Names
    all_blocks: list[Block]
    blocks: list[Block]  # `all_blocks` without skipped layers
    layers: dict[str, LayerPlan]
    tensors: dict[str, TensorInfo]  # tensors of the quantized checkpoint
    slices: dict[str, str]  # tensors of it that are a slice of a source tensor -> the parameter in the model
    changes: dict[str, Any]  # values to replace in config.json
    state: SourceState  # the folder's files before the first was read
    masks: frozenset[str]  # source tensors that may hold infinity: buffers, and those that the model does not use
    notes: list[str]  # for the user
    unused: frozenset[str] = frozenset()  # source tensors that no forward reads; notes name them
    rounded: frozenset[str] = frozenset()  # layers that no calibration input reaches, and an override asks for

    @property
    def stored_layers(self) -> Layers:
        return {plan.stored: (plan.scheme, plan.inputs) for plan in self.layers.values()}

    def source_bytes(self, layer: LayerPlan) -> int:
        """Bytes of a layer's weight in the source, 0 if the quantized checkpoint holds it too."""
        if not layer.replaces_source:
            return 0
        if layer.source in self.source.tensors:
            return self.source.stored_bytes(layer.source)
        fused = self.names.find_all(f"{layer.name}.weight")
        whole = sum(math.prod(self.source.tensors[name].shape) for name in fused)
        return sum(map(self.source.stored_bytes, fused)) * layer.outputs * layer.inputs // whole

    @property
    def format(self) -> Format:
        """The format of all quantized layers."""
        return next(iter(self.layers.values())).format

    @property
    def file_bytes(self) -> int:
        """Bytes of the files with tensors that the run will write."""
        return formats.FORMATS[self.format].file_bytes(self.tensors, self.folder)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all stored tensors of the quantized layers."""
        return sum(info.nbytes for plan in self.layers.values() for info in plan.layout.values())

    @property
    def kept_share(self) -> float:
        """Share of the model's parameters that stay unquantized, from 0 to 1."""
        layers = self.layers.values()
        quantized = sum(layer.outputs * layer.inputs for layer in layers)
        added = sum(layer.outputs * layer.inputs for layer in layers if not layer.replaces_source)
        held = sum(math.prod(i.shape) for i in self.source.tensors.values() if i.dtype.is_floating_point)
        return 1 - quantized / (held + added)

    @property
    def summary(self) -> str:
        """Describe the plan in one line for the user."""
        layers = self.layers.values()
        return (
            f"{len(layers)} layers in {len(self.blocks)} blocks at {self.bits_per_weight:.2f} bits per weight "
            f"({self.format}), {self.file_bytes / 1e6:,.1f} MB of files"
        )

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / sum(plan.outputs * plan.inputs for plan in self.layers.values())


def plan_checkpoint(
    model: str,
    config: QuantConfig,
    revision: str | None,
    trust_remote_code: bool,
    sample: Mapping[str, Tensor] | None = None,
    allow_pickle: bool = False,
) -> Plan:
    """Decide what happens to every tensor of a checkpoint, from its headers and config.json.

    Args:
        model: folder or Hub id.
        sample: the model's inputs of one window, if they are not text.
        allow_pickle: as for `gptq.quantize`.
    Raises:
        InputError: the checkpoint cannot be quantized with this config; the message says what to change.
    """
    folder = resolve(model, revision, allow_pickle)
    refuse_adapter(folder)
    state = SourceState.of(folder)
    opened = open_model(open_original(folder), trust_remote_code)
    source, hf_config, network, names = opened.source, opened.hf_config, opened.network, opened.names
    left_over = check_tensors(network, names, source.tensors)
    inputs = _probe_inputs(sample, network, config)
    every_block = find_blocks(network)
    trial = Trial() if inputs is None else run_trial(network, inputs)
    unreached = set() if inputs is None else find_unreached_layers(network, every_block, inputs, trial)
    uncalled = find_uncalled_layers(network, without_blocks_of(unreached, every_block), trial)
    unreached -= set(uncalled)
    left_out = unreached - find_asked_for(config.overrides, every_block, unreached)
    if config.lm_head:
        every_block.append(find_head(network))
    all_blocks = without_blocks_of(left_out, every_block)
    untied, changes = _untie(all_blocks[-1], names, hf_config, trust_remote_code)
    blocks, layers, extended = plan_layers(every_block, names, config, untied, uncalled, left_out)
    layers = _name_bases(_choose_scale_dtypes(layers, source), blocks, trial)
    changes = changes if untied in layers else {}
    notes = [*source.notes, *opened.notes, *notes_on_unreached(every_block, unreached, layers)]
    notes += [*note_on_uncalled(uncalled), *extended, *note_on_group_size(config, layers)]
    notes += notes_on_shapes(layers.values(), config)
    notes += formats.FORMATS[next(iter(layers.values())).format].model_notes(hf_config)
    unused = set() if inputs is None else _find_unused(opened, every_block, layers, trial) - {*left_over}
    notes += notes_on_unused(left_over, unused, source.tensors)
    notes += notes_on_repeats(blocks, trial)
    notes += [f"which tensors the model computes with is not known: {trial.failure}"] if trial.failure else []
    if config.polish_steps:
        notes.append("polishing holds the whole packed model; its memory and its time are in no figure of the plan")
    notes += note_on_left_out(folder, {file.name for file in source.files})
    tensors, slices = list_result_tensors(source, layers, names)
    refuse_model(model, folder, tensors, next(iter(layers.values())).format)
    rounded = frozenset(unreached & layers.keys())
    masks = frozenset(left_over) | {found for name, _ in network.named_buffers() if (found := names.find(name))}
    return Plan(
        folder,
        source,
        hf_config,
        network,
        names,
        all_blocks,
        blocks,
        layers,
        tensors,
        slices,
        changes,
        state,
        masks,
        notes,
        frozenset(unused.union(left_over)),
        rounded,
    )


def _find_unused(opened: OpenModel, blocks: list[Block], layers: Mapping[str, LayerPlan], trial: Trial) -> set[str]:
    """Return the tensors of the checkpoint that are neither packed nor computed with in the trial's forward."""
    if trial.failure:
        return set()
    packed = {stored for name in layers for stored in opened.names.find_all(f"{name}.weight")}
    return {*opened.source.tensors} - packed - find_used_tensors(opened.network, opened.names, blocks, trial)


def _probe_inputs(
    sample: Mapping[str, Tensor] | None, network: PreTrainedModel, config: QuantConfig
) -> Mapping[str, Tensor] | None:
    """Return inputs for a forward on the meta device; None if the method is RTN and the model does not take text."""
    if sample is not None:
        return accepted_inputs(sample, network)
    if config.method == "rtn" and network.main_input_name != "input_ids":
        return None
    return text_inputs(torch.zeros(PROBE_TOKENS, dtype=torch.long), network)


def without_blocks_of(left_out: Collection[str], blocks: Iterable[Block]) -> list[Block]:
    """Return the blocks, numbered anew, without those all of whose layers are left out."""
    kept = [block for block in blocks if not block.linears.keys() <= set(left_out)]
    return [replace(block, index=index) for index, block in enumerate(kept)]


def _untie(
    head: Block, names: Names, hf_config: PreTrainedConfig, trust_remote_code: bool
) -> tuple[str, dict[str, Any]]:
    """Return the name of the output head if config.json ties its weight, and the changes to config.json.

    Returns "" and no changes if `head` is not an output head, or is not tied.
    """
    if not head.is_head() or not names.is_tied(f"{head.name}.weight"):
        return "", {}
    check_untied(hf_config, head, names, trust_remote_code)
    return head.name, {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}


def plan_layers(
    blocks: list[Block], names: Names, config: QuantConfig, untied: str = "", uncalled: Collection[str] = (),
    left_out: Collection[str] = (),
) -> tuple[list[Block], dict[str, LayerPlan], list[str]]:  # fmt: skip
    """Return the blocks without skipped layers, a plan for each remaining layer, and notes for the user.

    Args:
        untied: name of the output head, if config.json ties its weight, and not any more in the result.
        uncalled: names of layers that cannot be quantized and are skipped.
        left_out: names of layers that no calibration input reaches; skipped too, and their blocks dropped.

    Raises:
        InputError: an override names no layer, overrides contradict each other on layers that engines fuse, or the
            format cannot hold a layer.
    """
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    gates = [name for name in find_gates(blocks) if name not in left_out]
    options, notes = resolve_layer_options(linears, config, left_out)
    kept_gates = [name for name in gates if not options[name]["skip"] and not is_named(name, gates, linears, config)]
    for name in kept_gates:
        options[name]["skip"] = True
    if kept_gates:
        notes.append(
            f"{abbreviate(kept_gates)}: gates and routers stay as they are, because no engine reads them packed"
        )
    plans: dict[str, LayerPlan] = {}
    wanted = {name: own for name, own in options.items() if not own["skip"] and name not in uncalled}
    made = [name for name in wanted if not names.find(f"{name}.weight") and names.find_split(f"{name}.weight")]
    if made:
        parts = " and ".join(names.find_all(f"{made[0]}.weight"))
        notes.append(
            f"{abbreviate(made)}: stays as it is: transformers computes such a weight from other tensors ({parts})"
        )
    for name in made:
        del wanted[name]
    for name, own in wanted.items():
        outputs, inputs = shape_of(linears[name])
        group_size = inputs if own["group_size"] == -1 else min(own["group_size"], inputs)
        part = names.find_slice(f"{name}.weight")
        source = part.stored if part else names.require(f"{name}.weight")
        if not source.endswith(".weight"):  # a reader would not find `qweight` under such a name
            notes.append(f"{name} stays as it is: the checkpoint calls its weight {source}")
            continue
        has_own = name != untied or names.find_own(f"{name}.weight") is not None
        stored = source.removesuffix(".weight") if has_own else name
        plans[name] = LayerPlan(
            name, stored, source, outputs, inputs, own["bits"], group_size, own["sym"], is_transposed(linears[name]),
            scattered=config.shuffles_groups and group_size < inputs,
        )  # fmt: skip
    if not plans:
        raise InputError("every layer is skipped, so there is nothing to quantize")
    chosen = choose_format(list(plans.values()), config)
    plans = {name: plan.stored_as(chosen) for name, plan in plans.items()}
    planned = without_blocks_of(left_out, blocks)
    kept = [replace(block, linears={n: m for n, m in block.linears.items() if n in plans}) for block in planned]
    return [block for block in kept if block.linears or not block.is_head()], plans, notes


def _choose_scale_dtypes(plans: dict[str, LayerPlan], source: Source) -> dict[str, LayerPlan]:
    """Set the dtype of scales, which may follow that of most of the checkpoint."""
    nbytes: Counter[torch.dtype] = Counter()
    for info in source.tensors.values():
        nbytes[info.dtype] += info.nbytes * info.dtype.is_floating_point
    most, _ = nbytes.most_common(1)[0]
    return {
        name: replace(plan, scale_dtype=formats.FORMATS[plan.format].choose_scale_dtype(most))
        for name, plan in plans.items()
    }


def _name_bases(plans: dict[str, LayerPlan], blocks: Iterable[Block], trial: Trial) -> dict[str, LayerPlan]:
    """Set what the outputs of layers are added to, where it is the input of another module of the same block."""
    found = dict(plans)
    for block in blocks:
        for name in block.linears:
            base = trial.added_to.get(name, "")
            if base.startswith(f"{block.name}."):
                found[name] = replace(found[name], added_to=base.removeprefix(f"{block.name}."))
    return found


def refuse_other_grids(plan: "Plan", also: Iterable[Format]) -> None:
    """Check that what is quantized for the plan's format can be written in further formats too, bit for bit.

    Raises:
        InputError: a format cannot hold a layer, or rounds to other values; the message names the layer.
    """
    layers = list(plan.layers.values())
    for chosen in also:
        own, found = formats.FORMATS[chosen], None
        if chosen == plan.format:
            found = "it is named twice"
        for layer in layers:
            scheme = replace(layer, format=chosen).scheme
            found = found or own.refusal(scheme, layer.outputs, layer.inputs, layer.transposed)
            if not found and not own.takes_grid(layer.grid, scheme):
                found = f"{plan.format!r} rounds to other values"
            if found:
                found = f"{layer.name}: {found}"
                break
        found = found or layers_refusal(layers, chosen) or own.model_refusal(plan.folder, plan.source.tensors)
        if found:
            raise InputError(
                f"{found}, so one run cannot write {plan.format!r} and {chosen!r}; quantize for {chosen!r} alone"
            )
