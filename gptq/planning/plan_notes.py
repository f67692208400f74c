"""What a plan tells the user of its layers."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from gptq import formats
from gptq.config import GROUP_SIZES, QuantConfig
from gptq.models.blocks import Block
from gptq.models.trial_forward import Trial
from gptq.planning.layer_plan import LayerPlan


def notes_on_repeats(blocks: Iterable[Block], trial: Trial) -> list[str]:
    """Return a note for the user on blocks that a forward runs several times, as ALBERT does; one for all."""
    several = [(block.name, times) for block in blocks if (times := trial.called[block.name]) > 1]
    remark = "times in a forward, and is calibrated on what reaches it the first time"
    return [f"{name} runs {times} {remark}" for name, times in several[:1]]


def note_on_group_size(config: QuantConfig, layers: Mapping[str, LayerPlan]) -> list[str]:
    """Return a note for the user if the format has decided on the group size."""
    if config.format not in GROUP_SIZES:
        return []
    sizes = " and ".join(str(size) for size in sorted({plan.group_size for plan in layers.values()}))
    return [f"groups of {sizes} inputs share a scale, as the format {config.format!r} has it"]


def notes_on_unreached(blocks: Iterable[Block], unreached: Collection[str], layers: Collection[str]) -> Iterator[str]:
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
            subject = name if whole and not asked else abbreviate(stay)
            one = subject in (name, *stay)
            verb, it = ("stays as it is", "it") if one else ("stay as they are", "them")
            yield f"{subject} {verb}: the calibration has no inputs for {it}"
        if asked:
            yield f"{abbreviate(asked)}: rounded to nearest, as an override asks; no calibration input reaches this"


def note_on_uncalled(uncalled: list[str]) -> list[str]:
    subject = f" and {len(uncalled) - 1} more stay as they are" if len(uncalled) > 1 else " stays as it is"
    why = "the model computes with the weight before it calls the layer, if it does"
    return [f"{uncalled[0]}{subject}: {why}"] if uncalled else []


def notes_on_shapes(plans: Iterable[LayerPlan], config: QuantConfig) -> Iterator[str]:
    """Yield a note for the user on each kind of shape that is not a multiple of the group or word size."""
    layers_by_remark: dict[str, list[str]] = {}
    for plan in plans:
        for remark in _remarks(plan, config):
            layers_by_remark.setdefault(remark, []).append(plan.name)
    for remark, names in layers_by_remark.items():
        yield f"{abbreviate(names)}: {remark}"


def _remarks(plan: LayerPlan, config: QuantConfig) -> Iterator[str]:
    whole, rest = divmod(plan.inputs, plan.group_size)
    others = "vLLM, SGLang and GPTQModel do" if plan.bits == 3 else "GPTQModel read that, vLLM and SGLang do"
    readers = f"this package {'reads that,' if plan.bits == 3 else 'and'} {others} not"
    if plan.group_size == plan.inputs < config.group_size:
        yield f"{plan.inputs} inputs are one group, smaller than the group size of {config.group_size}"
    if rest:
        groups = f"{whole} groups" if whole > 1 else "1 group"
        yield f"{plan.inputs} inputs are {groups} of {plan.group_size} and a last one of {rest}; {readers}"
    if not formats.FORMATS[plan.format].needs_whole_words:
        return
    for count, what in ((plan.inputs, "inputs"), (plan.outputs, "outputs")):
        if count * plan.bits % 32:
            yield f"{count} {what} of {plan.bits} bits do not fill whole 32-bit words; {readers}"


def abbreviate(names: list[str]) -> str:
    """Name many layers briefly: their names inside a block, their number, and the first layer's full name."""
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return f"{kinds} in {len(names)} layers ({names[0]} ...)" if len(names) > 1 else names[0]
