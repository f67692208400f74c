"""What will be done with every tensor of a checkpoint, decided before the first weight is read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptq import formats
from gptq.blocks import Block, Names, shape
from gptq.checkpoint import Source, TensorInfo
from gptq.config import QuantConfig
from gptq.errors import InputError


@dataclass(frozen=True)
class LayerPlan:
    """What will be done with one linear layer."""

    name: str  # in the model
    stored: str  # in the checkpoint
    outputs: int
    inputs: int
    group_size: int


def plan_block(block: Block, names: Names, config: QuantConfig) -> Iterator[LayerPlan]:
    for name, linear in block.linears.items():
        outputs, inputs = shape(linear)
        group_size = inputs if config.group_size == -1 else min(config.group_size, inputs)
        yield LayerPlan(name, names.stored(f"{name}.weight").removesuffix(".weight"), outputs, inputs, group_size)


def notes_on_shapes(plans: Iterable[LayerPlan], config: QuantConfig) -> Iterator[str]:
    """What a user should know of shapes that do not divide, once for the like layers of all blocks."""
    alike: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        for remark in _remarks(plan, config):
            alike.setdefault((plan.name.rpartition(".")[2], remark), []).append(plan.name)
    for (kind, remark), names in alike.items():
        which = f"{kind} in {len(names)} layers ({names[0]} ...)" if len(names) > 1 else names[0]
        yield f"{which}: {remark}"


def _remarks(plan: LayerPlan, config: QuantConfig) -> Iterator[str]:
    whole, rest = divmod(plan.inputs, plan.group_size)
    readers = "this package and GPTQModel read that, vLLM and SGLang do not"
    if plan.group_size < config.group_size:
        yield f"{plan.inputs} inputs are one group, smaller than the group size of {config.group_size}"
    if rest:
        yield f"{plan.inputs} inputs are {whole} groups of {plan.group_size} and a last one of {rest}; {readers}"
    for count, what in ((plan.inputs, "inputs"), (plan.outputs, "outputs")):
        if count * config.bits % 32:
            yield f"{count} {what} of {config.bits} bits do not fill whole 32-bit words; {readers}"


def announce(source: Source, plans: dict[str, LayerPlan], config: QuantConfig) -> dict[str, TensorInfo]:
    """Every tensor of the result, in the source's order: each source tensor is copied, or a layer's weight replaced."""
    by_weight = {f"{plan.stored}.weight": plan for plan in plans.values()}
    announced: dict[str, TensorInfo] = {}
    for name, info in source.tensors.items():
        plan = by_weight.get(name)
        if plan is None:
            announced[name] = info
        else:
            layout = formats.layout(plan.outputs, plan.inputs, config.bits, plan.group_size)
            for suffix, packed in layout.items():
                if f"{plan.stored}.{suffix}" in source.tensors:
                    raise InputError(f"the checkpoint holds {plan.stored}.{suffix} already; is it quantized?")
                announced[f"{plan.stored}.{suffix}"] = packed
    return announced
