"""Which engines take a file: the rules of their readers, each with where it stands.

Nothing here runs an engine. The rules were read from vLLM (September 2026), SGLang and GPTQModel 7.7; where a rule is
not known, the answer says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gptq.formats.codec import GPTQ_BITS, Scheme
from gptq.formats.quantization_config import Layers, on
from gptq.models.blocks import fused_siblings

MARLIN = ((4, True), (8, True))


@dataclass(frozen=True)
class Engine:
    """Whether an engine takes a file, and the reason or the condition."""

    name: str
    takes: bool
    why: str


def engines(layers: Layers) -> list[Engine]:
    """What each engine makes of a file that holds these layers."""
    judges: dict[str, Callable[[Layers], tuple[bool, str]]] = {
        "gptq": lambda _: (True, "`gptq.load`, or `import gptq` and then transformers"),
        "transformers": _transformers,
        "vLLM": _vllm,
        "SGLang": _sglang,
        "GPTQModel": _gptqmodel,
    }
    return [Engine(name, *judge(layers)) for name, judge in judges.items()]


def _is_packed(layers: Layers) -> bool:
    return next(iter(layers.values()))[0].format == "pack-quantized"


def _uneven(layers: Layers) -> str | None:
    """The first layer whose last group is short or whose words are not full."""
    for name, (scheme, inputs) in layers.items():
        if inputs % scheme.columns(inputs):
            return f"{name} has {inputs} inputs, which groups of {scheme.group_size} do not divide"
        if scheme.format != "pack-quantized" and inputs * scheme.bits % 32:
            return f"{name} has {inputs} inputs of {scheme.bits} bits, which do not fill whole words"
    return None


def _transformers(layers: Layers) -> tuple[bool, str]:
    if not _is_packed(layers):  # transformers/quantizers/quantizer_gptq.py
        alike = len({on(*layer) for layer in layers.values()}) == 1  # optimum does not know `dynamic`
        other = "; or with optimum and gptqmodel" if alike and _beyond_gptqmodel(layers) is None else ""
        return True, f"with `import gptq`{other}"
    if any(scheme.scattered for scheme, _ in layers.values()):
        return False, "compressed-tensors has dropped act-order by groups (quantization/quant_args.py, actorder)"
    uneven = _uneven(layers)
    if uneven:  # compressed_tensors/quantization/lifecycle/forward_helpers.py, _process_group
        return False, f"compressed-tensors wants whole groups, and {uneven}"
    if not all(scheme.sym for scheme, _ in layers.values()):  # tried, with llm-compressor's own files too
        return False, "5.23 fails on asymmetric compressed-tensors files of every tool; 5.17 reads them"
    odd = {scheme.bits for scheme, _ in layers.values()} - {1, 2, 4, 8}
    release = "0.18 (older ones pack these widths in another way)" if odd else "0.15"
    return True, f"with compressed-tensors from {release}"


def _vllm(layers: Layers) -> tuple[bool, str]:
    uneven = _uneven(layers) or _split_siblings(layers)
    if uneven:
        return False, uneven
    schemes = {scheme for scheme, _ in layers.values()}
    if _is_packed(layers):
        wide = [s for s in schemes if not s.sym and s.bits not in (4, 8)]
        if wide:  # vLLM #46528 is reported to extend it
            return False, f"asymmetric {wide[0].bits} bits; of asymmetric weights it takes 4 and 8 bits"
        plain = all(s.bits in (4, 8) for s in schemes)
        return True, "as compressed-tensors" if plain else "as compressed-tensors, in releases with Humming kernels"
    other = [s for s in schemes if (s.bits, s.sym) not in MARLIN]
    if other:  # auto_gptq.py, TYPE_MAP
        kind = "symmetric" if other[0].sym else "asymmetric"
        return False, f"its GPTQ reader takes symmetric 4 and 8 bits, not {kind} {other[0].bits}; try pack-quantized"
    if next(iter(schemes)).format == "gptq_v2":
        return True, "from #26092 on; older releases read v2 as v1"
    return True, "its Marlin kernels take symmetric 4 and 8 bits"


def _split_siblings(layers: Layers) -> str | None:
    """vLLM makes one layer of them, so they have to be stored alike (utils/gptq_utils.py)."""
    for group in fused_siblings(layers):
        kinds = {on(*layers[name]) for name in group}
        if len(kinds) > 1:
            return f"{' and '.join(group)} are stored differently, and it fuses them"
    return None


def _sglang(layers: Layers) -> tuple[bool, str]:
    uneven = _uneven(layers) or _split_siblings(layers)
    if uneven:
        return False, uneven
    schemes = {scheme for scheme, _ in layers.values()}
    if _is_packed(layers):
        if all((s.bits, s.sym) in MARLIN for s in schemes):
            return True, "its compressed-tensors reader, which its documentation calls minimally tested"
        return False, "of compressed-tensors files only symmetric 4 and 8 bits are known to be taken"
    marlin = all((s.bits, s.sym) in MARLIN for s in schemes)
    return True, "in float16 or bfloat16 (Marlin)" if marlin else "in float16 only"


def _gptqmodel(layers: Layers) -> tuple[bool, str]:
    if _is_packed(layers):
        return False, "it reads GPTQ files; `gptq convert --format gptq` makes one"
    beyond = _beyond_gptqmodel(layers)
    if beyond:
        return False, beyond
    if any(_is_own_v1(scheme) for scheme, _ in layers.values()):
        return False, "asymmetric v1 it takes from itself only (models/loader.py); convert to gptq_v2"
    return True, "any kernel that fits, its torch one always"


def _beyond_gptqmodel(layers: Layers) -> str | None:
    """What no kernel of it computes."""
    for name, (scheme, inputs) in layers.items():
        if scheme.bits not in GPTQ_BITS:
            return f"{name} has {scheme.bits} bits"
        if scheme.bits == 3 and inputs % 32:  # nn_modules/qlinear/__init__.py, dequantize_weight: words in threes
            return f"at 3 bits it wants multiples of 32 inputs, and {name} has {inputs}"
    return None


def _is_own_v1(scheme: Scheme) -> bool:
    return scheme.format == "gptq" and not scheme.sym and not scheme.by_gptqmodel
