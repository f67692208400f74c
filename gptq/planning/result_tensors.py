"""List the tensors of a quantized checkpoint."""

from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.errors import InputError
from gptq.models.tensor_names import Names
from gptq.planning.layer_plan import LayerPlan


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
