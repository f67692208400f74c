"""What will be done with every tensor of a checkpoint, decided before the first weight is read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptq import formats
from gptq.blocks import Block, Names, shape
from gptq.checkpoint import Source, TensorInfo
from gptq.config import QuantConfig


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


def notes_on_shapes(plans: Iterable[LayerPlan]) -> Iterator[str]:
    """What a user should know of shapes that do not divide, once for the like layers of all blocks."""
    alike: dict[tuple[str, int, int], list[str]] = {}
    for plan in plans:
        if plan.inputs % plan.group_size:
            key = (plan.name.rpartition(".")[2], plan.inputs, plan.group_size)
            alike.setdefault(key, []).append(plan.name)
    for (kind, inputs, group_size), names in alike.items():
        whole, rest = divmod(inputs, group_size)
        which = f"{kind} in {len(names)} layers ({names[0]} ...)" if len(names) > 1 else names[0]
        yield (
            f"{which}: {inputs} inputs are {whole} x {group_size} and a "
            f"last group of {rest}. This package and GPTQModel read that; vLLM and SGLang want whole groups"
        )


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
            announced |= {f"{plan.stored}.{suffix}": packed for suffix, packed in layout.items()}
    return announced
