"""Plan a run from headers and config.json: the layers to quantize, their options, and every tensor of the result."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gptq import formats
from gptq.checkpoint.companions import note_on_left_out
from gptq.checkpoint.hub import resolve
from gptq.checkpoint.reader import Source
from gptq.checkpoint.source_state import SourceState
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import GROUP_SIZES, Format, Override, QuantConfig
from gptq.errors import InputError
from gptq.formats.original import open_original
from gptq.formats.scheme import Layers, Scheme
from gptq.models.blocks import Block, find_blocks, find_gates, find_head, group_fused_siblings, is_transposed, shape_of
from gptq.models.build import OpenModel, check_untied, open_model
from gptq.models.forward import accepted_inputs, text_inputs
from gptq.models.reached_layers import find_uncalled_layers, find_unreached_layers
from gptq.models.tensor_names import Names, check_tensors
from gptq.models.tensor_use import find_used_tensors, notes_on_unused
from gptq.models.trial_forward import Trial, run_trial
from gptq.solver import Grid

PROBE_TOKENS = 8  # tokens of the window that is run on the meta device to find out which layers are called


@dataclass(frozen=True)
class LayerPlan:
    """How one linear layer is quantized, after overrides."""

    name: str  # in the model
    stored: str  # the layer's name in the quantized checkpoint
    source: str  # name of the weight in the source checkpoint; another layer's if tied, `stored`.weight if a slice
    outputs: int
    inputs: int
    bits: int
    group_size: int  # columns per group, at most the number of inputs
    sym: bool
    transposed: bool = False  # the weight is stored as (inputs, outputs): a Conv1D of transformers
    format: Format = "gptq"
    scattered: bool = False  # groups are not contiguous columns
    scale_dtype: torch.dtype = formats.SCALE_DTYPE
    added_to: str = ""  # the module of the block to whose input the outputs are added; empty if none is known

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group_size, self.sym, self.format, self.scattered)

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return {**vars(self), "scale_dtype": str(self.scale_dtype).removeprefix("torch.")}

    def stored_as(self, chosen: Format) -> "LayerPlan":
        """Return the plan with another format, and the group size and symmetry that this has."""
        scheme = formats.FORMATS[chosen].adapt(replace(self, format=chosen).scheme)
        return replace(self, format=chosen, group_size=scheme.group_size, sym=scheme.sym)

    @property
    def replaces_source(self) -> bool:
        """Whether the result has the packed layer in place of the source's weight; not for an untied head."""
        return self.source == f"{self.stored}.weight"

    @property
    def layout(self) -> dict[str, TensorInfo]:
        """Dtype and shape of the layer's stored tensors, by key."""
        return formats.layout(self.scheme, self.outputs, self.inputs, self.scale_dtype)

    @property
    def grid(self) -> Grid:
        """What the layer's weights are rounded to."""
        return formats.FORMATS[self.format].grid(self.scheme, self.scale_dtype)


def drifts_by_output(fused: Sequence[LayerPlan]) -> bool:
    """Whether the drift of layers that engines fuse is one of their outputs (see `solver.error_propagation`).

    It is for a layer by itself that is added to the residual stream, or has fewer outputs than inputs.
    """
    return len(fused) == 1 and (bool(fused[0].added_to) or fused[0].outputs < fused[0].inputs)


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
    left_out = unreached - _asked_for(config.overrides, every_block, unreached)
    if config.lm_head:
        every_block.append(find_head(network))
    all_blocks = without_blocks_of(left_out, every_block)
    untied, changes = _untie(all_blocks[-1], names, hf_config, trust_remote_code)
    blocks, layers, extended = plan_layers(every_block, names, config, untied, uncalled, left_out)
    layers = _name_bases(_choose_scale_dtypes(layers, source), blocks, trial)
    changes = changes if untied in layers else {}
    notes = [*source.notes, *opened.notes, *_notes_on_unreached(every_block, unreached, layers)]
    notes += [*_note_on_uncalled(uncalled), *extended, *_note_on_group_size(config, layers)]
    notes += notes_on_shapes(layers.values(), config)
    unused = set() if inputs is None else _find_unused(opened, every_block, layers, trial) - {*left_over}
    notes += notes_on_unused(left_over, unused, source.tensors)
    notes += _notes_on_repeats(blocks, trial)
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


def _notes_on_repeats(blocks: Iterable[Block], trial: Trial) -> list[str]:
    """Return a note for the user on blocks that a forward runs several times, as ALBERT does; one for all."""
    several = [(block.name, times) for block in blocks if (times := trial.called[block.name]) > 1]
    remark = "times in a forward, and is calibrated on what reaches it the first time"
    return [f"{name} runs {times} {remark}" for name, times in several[:1]]


def _find_unused(opened: OpenModel, blocks: list[Block], layers: Mapping[str, LayerPlan], trial: Trial) -> set[str]:
    """Return the tensors of the checkpoint that are neither packed nor computed with in the trial's forward."""
    if trial.failure:
        return set()
    packed = {stored for name in layers for stored in opened.names.find_all(f"{name}.weight")}
    return {*opened.source.tensors} - packed - find_used_tensors(opened.network, opened.names, blocks, trial)


def refuse_model(model: str | Path, folder: Path, tensors: Collection[str], chosen: Format) -> None:
    """Raises InputError if the format `chosen` cannot hold the model in `folder`, with these tensors."""
    reason = formats.FORMATS[chosen].model_refusal(folder, tensors)
    if reason:
        raise InputError(f"{model} cannot be written as {chosen!r}: {reason}")


def _note_on_group_size(config: QuantConfig, layers: Mapping[str, LayerPlan]) -> list[str]:
    """Return a note for the user if the format has decided on the group size."""
    if config.format not in GROUP_SIZES:
        return []
    sizes = " and ".join(str(size) for size in sorted({plan.group_size for plan in layers.values()}))
    return [f"groups of {sizes} inputs share a scale, as the format {config.format!r} has it"]


def _probe_inputs(
    sample: Mapping[str, Tensor] | None, network: PreTrainedModel, config: QuantConfig
) -> Mapping[str, Tensor] | None:
    """Return inputs for a forward on the meta device; None if the method is RTN and the model does not take text."""
    if sample is not None:
        return accepted_inputs(sample, network)
    if config.method == "rtn" and network.main_input_name != "input_ids":
        return None
    return text_inputs(torch.zeros(PROBE_TOKENS, dtype=torch.long), network)


def _asked_for(overrides: Iterable[Override], blocks: Iterable[Block], unreached: Collection[str]) -> set[str]:
    """Return the layers that no input reaches but an override asks for: one that names such layers and no others."""
    asked: set[str] = set()
    layers = [name for block in blocks for name in block.linears]
    for override in overrides:
        named = {name for name in layers if re.search(override.pattern, name)}
        if not override.skip and named <= set(unreached):
            asked |= named
    return asked


def without_blocks_of(left_out: Collection[str], blocks: Iterable[Block]) -> list[Block]:
    """Return the blocks, numbered anew, without those all of whose layers are left out."""
    kept = [block for block in blocks if not block.linears.keys() <= set(left_out)]
    return [replace(block, index=index) for index, block in enumerate(kept)]


def _notes_on_unreached(blocks: Iterable[Block], unreached: Collection[str], layers: Collection[str]) -> Iterator[str]:
    """Yield a note for the user on each list of blocks with layers that no calibration input reaches."""
    lists: dict[str, list[Block]] = {}
    for block in blocks:
        lists.setdefault(block.name.rpartition(".")[0], []).append(block)
    for name, members in lists.items():
        missed = [layer for block in members for layer in block.linears if layer in unreached]
        asked = [layer for layer in missed if layer in layers]
        stay = [layer for layer in missed if layer not in layers]
        whole = len(missed) == sum(len(block.linears) for block in members)
        if stay:
            subject = name if whole and not asked else _abbreviate(stay)
            one = subject in (name, *stay)
            verb, it = ("stays as it is", "it") if one else ("stay as they are", "them")
            yield f"{subject} {verb}: the calibration has no inputs for {it}"
        if asked:
            yield f"{_abbreviate(asked)}: rounded to nearest, as an override asks; no calibration input reaches this"


def _note_on_uncalled(uncalled: list[str]) -> list[str]:
    subject = f" and {len(uncalled) - 1} more stay as they are" if len(uncalled) > 1 else " stays as it is"
    why = "the model computes with the weight before it calls the layer, if it does"
    return [f"{uncalled[0]}{subject}: {why}"] if uncalled else []


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
    kept_gates = [name for name in gates if not options[name]["skip"] and not _is_named(name, gates, linears, config)]
    for name in kept_gates:
        options[name]["skip"] = True
    if kept_gates:
        notes.append(
            f"{_abbreviate(kept_gates)}: gates and routers stay as they are, because no engine reads them packed"
        )
    plans: dict[str, LayerPlan] = {}
    wanted = {name: own for name, own in options.items() if not own["skip"] and name not in uncalled}
    made = [name for name in wanted if not names.find(f"{name}.weight") and names.find_split(f"{name}.weight")]
    if made:
        parts = " and ".join(names.find_all(f"{made[0]}.weight"))
        notes.append(
            f"{_abbreviate(made)}: stays as it is: transformers computes such a weight from other tensors ({parts})"
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


def _is_named(name: str, gates: Collection[str], layers: Iterable[str], config: QuantConfig) -> bool:
    """Whether an override names this gate, and nothing but gates."""
    named = (o for o in config.overrides if not o.skip and re.search(o.pattern, name))
    return any(all(layer in gates for layer in layers if re.search(o.pattern, layer)) for o in named)


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


def choose_format(plans: list[LayerPlan], config: QuantConfig) -> Format:
    """Return the configured format; for "auto" the format that most inference engines read.

    - Symmetric, all layers at 4 bits or all at 8 bits: GPTQ v1, which vLLM, SGLang and GPTQModel all read.
    - Other symmetric checkpoints, and asymmetric ones at 4 or 8 bits: pack-quantized, the only format in which vLLM
      reads these; GPTQ if pack-quantized cannot hold a layer.
    - Other asymmetric checkpoints: GPTQ v2; pack-quantized if GPTQ v2 cannot hold a layer.

    Raises:
        InputError: no candidate can hold every layer; the message names a layer.
    """
    if config.format != "auto":
        wanted: list[Format] = [config.format]
    else:
        widths, sym = {plan.bits for plan in plans}, all(plan.sym for plan in plans)
        plain: Format = "gptq" if sym else "gptq_v2"
        wanted = ["gptq"] if sym and widths in ({4}, {8}) else ["pack-quantized", plain]
        if not sym and not widths <= {4, 8}:
            wanted.reverse()
    refused = []
    for candidate in wanted:
        reasons = (_refusal(plan, candidate) for plan in plans)
        found = next((reason for reason in reasons if reason), None) or _layers_refusal(plans, candidate)
        if found is None:
            return candidate
        refused.append(f"{found}, so it cannot be written as {candidate!r}")
    other = "another --format, width" if config.format != "auto" else "another width"
    raise InputError(f"{'; '.join(refused)}; choose {other} or group size, or let --override skip the layer")


def _refusal(plan: LayerPlan, candidate: Format) -> str | None:
    reason = formats.refusal(plan.stored_as(candidate).scheme, plan.outputs, plan.inputs, plan.transposed)
    return reason and f"{plan.name}: {reason}"


def _layers_refusal(plans: list[LayerPlan], candidate: Format) -> str | None:
    layers = {plan.stored: (replace(plan, format=candidate).scheme, plan.inputs) for plan in plans}
    return formats.FORMATS[candidate].layers_refusal(layers)


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
        found = found or _layers_refusal(layers, chosen) or own.model_refusal(plan.folder, plan.source.tensors)
        if found:
            raise InputError(
                f"{found}, so one run cannot write {plan.format!r} and {chosen!r}; quantize for {chosen!r} alone"
            )


def resolve_layer_options(
    layers: Iterable[str], config: QuantConfig, left_out: Collection[str] = ()
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return bits, group_size, sym and skip of every layer, and notes for the user; layers in `left_out` are skipped.

    Siblings that engines fuse get the same options: an override that names some of them holds for all.

    Raises:
        InputError: an override names no layer, or overrides contradict each other on siblings.
    """
    layers = list(layers)
    defaults = {"bits": config.bits, "group_size": config.group_size, "sym": config.sym, "skip": False}
    options = {name: dict(defaults) for name in layers}
    extended: dict[Override, list[str]] = {}
    unused = list(config.overrides)
    for group in group_fused_siblings(layers):
        matched = {o: [n for n in group if re.search(o.pattern, n)] for o in config.overrides}
        matched = {override: members for override, members in matched.items() if members}
        _refuse_contradictions({o: members for o, members in matched.items() if len(members) < len(group)})
        for override, members in matched.items():
            for name in group:
                options[name] |= override.options()
            extended.setdefault(override, []).extend(n for n in group if n not in members)
        unused = [override for override in unused if override not in matched]
    if unused:
        raise InputError(f"the override '{unused[0]}' names no layer; a layer is called {layers[0]}, for example")
    for name in left_out:
        options[name]["skip"] = True
    reached = {o: [n for n in names if o.skip or not options[n]["skip"]] for o, names in extended.items()}
    return options, [_note_on_extension(override, names) for override, names in reached.items() if names]


def _refuse_contradictions(partial: dict[Override, list[str]]) -> None:
    """Check overrides that each name some of the same siblings.

    Raises:
        InputError: two overrides name different layers and set an option to different values.
    """
    seen: dict[str, Override] = {}
    for override, members in partial.items():
        for option, value in override.options().items():
            earlier = seen.setdefault(option, override)
            if earlier.options()[option] != value and not set(partial[earlier]) & set(members):
                raise InputError(
                    f"the overrides '{earlier}' and '{override}' differ in {option} of {partial[earlier][0]} and "
                    f"{members[0]}, which engines fuse into one layer; give both the same"
                )
            seen[option] = override


def _note_on_extension(override: Override, names: list[str]) -> str:
    also = _abbreviate(names)
    return f"the override '{override}' holds for {also} as well, because engines fuse them with the layers it names"


def _abbreviate(names: list[str]) -> str:
    """Name many layers briefly: their names inside a block, their number, and the first layer's full name."""
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return f"{kinds} in {len(names)} layers ({names[0]} ...)" if len(names) > 1 else names[0]


def notes_on_shapes(plans: Iterable[LayerPlan], config: QuantConfig) -> Iterator[str]:
    """Yield a note for the user on each kind of shape that is not a multiple of the group or word size."""
    layers_by_remark: dict[str, list[str]] = {}
    for plan in plans:
        for remark in _remarks(plan, config):
            layers_by_remark.setdefault(remark, []).append(plan.name)
    for remark, names in layers_by_remark.items():
        yield f"{_abbreviate(names)}: {remark}"


def _remarks(plan: LayerPlan, config: QuantConfig) -> Iterator[str]:
    whole, rest = divmod(plan.inputs, plan.group_size)
    others = "vLLM, SGLang and GPTQModel do" if plan.bits == 3 else "GPTQModel read that, vLLM and SGLang do"
    readers = f"this package {'reads that,' if plan.bits == 3 else 'and'} {others} not"
    if plan.group_size == plan.inputs < config.group_size:
        yield f"{plan.inputs} inputs are one group, smaller than the group size of {config.group_size}"
    if rest:
        yield f"{plan.inputs} inputs are {whole} groups of {plan.group_size} and a last one of {rest}; {readers}"
    if not formats.FORMATS[plan.format].needs_whole_words:
        return
    for count, what in ((plan.inputs, "inputs"), (plan.outputs, "outputs")):
        if count * plan.bits % 32:
            yield f"{count} {what} of {plan.bits} bits do not fill whole 32-bit words; {readers}"


def list_result_tensors(
    source: Source, plans: dict[str, LayerPlan], names: Names
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return all tensors of the quantized checkpoint, in the source's order; and those that are slices of a source's.

    Each source tensor is copied, or replaced by the packed tensors of its layer, or of all layers that it holds slices
    of. Slices that no layer packs become tensors of their own; the second value names the parameter of each in the
    model. Of a fused layer whose pieces are all copied, the fused tensors are copied. The weight of an untied head is
    both copied, for the embedding, and packed.

    Raises:
        InputError: the source holds a tensor of the same name as a packed tensor.
    """
    by_weight = {plan.source: plan for plan in plans.values()}
    fused = {_layer_of(source, name) for name in by_weight if name in source.tensors}
    sliced = names.slices_by_tensor(plans)
    result: dict[str, TensorInfo] = {}
    slices: dict[str, str] = {}
    for name, info in source.tensors.items():
        for parameter, part in sliced.get(name, {}).items():
            if part.stored in by_weight:
                result |= _packed_tensors(by_weight[part.stored], source)
            else:
                result[part.stored], slices[part.stored] = TensorInfo(info.dtype, part.shape), parameter
        plan = by_weight.get(name)
        if _layer_of(source, name) not in fused:
            name, info = source.undivided(name)
        if name not in sliced and (plan is None or not plan.replaces_source):
            result[name] = info
        if plan is not None:
            result |= _packed_tensors(plan, source)
    return result, slices


def _layer_of(source: Source, name: str) -> str:
    """Return the layer in the checkpoint's files that holds a tensor, or that the tensor is a piece of."""
    return source.undivided(name)[0].rpartition(".")[0]


def _packed_tensors(plan: LayerPlan, source: Source) -> dict[str, TensorInfo]:
    """Return the tensors of a packed layer.

    Raises:
        InputError: the source holds a tensor of the same name.
    """
    for suffix in plan.layout:
        if f"{plan.stored}.{suffix}" in source.tensors and f"{plan.stored}.{suffix}" != plan.source:
            raise InputError(f"the checkpoint holds {plan.stored}.{suffix} already; is it quantized?")
    return {f"{plan.stored}.{suffix}": packed for suffix, packed in plan.layout.items()}
