"""Choose a format that holds every layer, or say why none does."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from gptq import formats
from gptq.config import Format, QuantConfig
from gptq.errors import InputError
from gptq.planning.layer_plan import LayerPlan


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
        found = next((reason for reason in reasons if reason), None) or layers_refusal(plans, candidate)
        if found is None:
            return candidate
        refused.append(f"{found}, so it cannot be written as {candidate!r}")
    other = "another --format, width" if config.format != "auto" else "another width"
    raise InputError(f"{'; '.join(refused)}; choose {other} or group size, or let --override skip the layer")


def _refusal(plan: LayerPlan, candidate: Format) -> str | None:
    reason = formats.refusal(plan.stored_as(candidate).scheme, plan.outputs, plan.inputs, plan.transposed)
    return reason and f"{plan.name}: {reason}"


def layers_refusal(plans: list[LayerPlan], candidate: Format) -> str | None:
    layers = {plan.stored: (replace(plan, format=candidate).scheme, plan.inputs) for plan in plans}
    return formats.FORMATS[candidate].layers_refusal(layers)


def refuse_model(model: str | Path, folder: Path, tensors: Collection[str], chosen: Format) -> None:
    """Raises InputError if the format `chosen` cannot hold the model in `folder`, with these tensors."""
    reason = formats.FORMATS[chosen].model_refusal(folder, tensors)
    if reason:
        raise InputError(f"{model} cannot be written as {chosen!r}: {reason}")
