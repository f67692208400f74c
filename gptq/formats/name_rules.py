"""Write, check and match the regular expressions by which a `quantization_config` names layers.

vLLM makes one layer of q/k/v and of gate/up and looks for the name of the fused layer
(vllm/model_executor/layers/quantization/utils/gptq_utils.py); other engines look for the names of the single layers. So
the expressions that are written match the fused name and the single names.
"""

import math
import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import regex

from gptq.config import Format
from gptq.errors import InputError
from gptq.formats.scheme import Scheme
from gptq.models.blocks import FUSED, group_fused_siblings

PATIENCE = 60.0  # seconds of the processor for all rules on all layers; 10,000 layers and 100 rules take four
MAX_EXPRESSION, MAX_REPEATS = 100_000, 1000  # characters of an expression, and product of its {counts}


@dataclass(frozen=True)
class Quantization:
    """What a `quantization_config` says; `rules` come before `everywhere`, None stands for "not quantized"."""

    format: Format
    everywhere: Scheme | None
    rules: tuple[tuple[str, Scheme | None], ...] = ()

    def schemes(self, layers: Iterable[str]) -> dict[str, Scheme | None]:
        """Return the scheme of each of these layers, by name; None for a layer that is not quantized.

        Raises:
            InputError: matching a rule takes too long; some expressions take time exponential in a name's length.
        """
        rules = [(regex.compile(pattern), scheme) for pattern, scheme in self.rules]
        until = time.process_time() + PATIENCE
        found: dict[str, Scheme | None] = {}
        for layer in layers:
            found[layer] = self.everywhere
            for rule, scheme in rules:
                try:
                    matches = rule.match(layer, timeout=max(until - time.process_time(), 0.01))
                except TimeoutError as error:
                    raise InputError(f"the rule {rule.pattern!r} of a quantization_config does not end") from error
                if matches:
                    found[layer] = scheme
                    break
        return found


def check_expression(where: str | Path, pattern: str) -> None:
    """Raises InputError if `pattern` is not a regular expression, or would take gigabytes when it is compiled."""
    counts = [int(number) for number in re.findall(r"\d{1,9}", "".join(re.findall(r"\{[\d,]*\}", pattern)))]
    if len(pattern) > MAX_EXPRESSION or math.prod(max(count, 1) for count in counts) > MAX_REPEATS:
        raise InputError(f"{where}: the regular expression {pattern[:80]!r} is too large")
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: {pattern[:80]!r} is not a regular expression: {error}") from error


def name_patterns(chosen: Collection[str], layers: Collection[str]) -> list[str]:
    """Return regular expressions that match the chosen ones of `layers`, and the names of the layers fused from them.

    The outermost module's name is left open, because checkpoints and engines use different names, unless this name
    tells chosen layers from other layers (those of an encoder from those of a decoder).
    """
    found = _write_patterns(chosen, layers, whole=False)
    others = set(layers) - set(chosen)
    clash = any(re.match(pattern, other) for pattern in found for other in others)
    return _write_patterns(chosen, layers, whole=True) if clash else found


def _write_patterns(chosen: Collection[str], layers: Collection[str], whole: bool) -> list[str]:
    numbers: dict[tuple[str, str], list[str]] = {}  # (before and after the number of the block) -> numbers
    complete = {frozenset(group) for group in group_fused_siblings(layers) if len(group) > 1}
    for group in group_fused_siblings(chosen):
        before, number, after = _split_at_number(group[0].rpartition(".")[0], whole)
        alternatives = _alternatives(group, frozenset(group) in complete)
        numbers.setdefault((before, f"{after}\\.{alternatives}"), []).append(number)
    every = {n for n in (_split_at_number(name, whole)[1] for name in layers) if n}
    found = []
    for (before, after), which in numbers.items():
        if which == [""]:
            name = f"{before}{after}".removeprefix("\\.")  # a layer of the model itself, such as the output head
            found.append(f"(?:.*\\.)?{name}$")
            continue
        middle = r"\d+" if set(which) == every else f"(?:{'|'.join(which)})"
        found.append(f"(?:.*\\.)?{before}\\.{middle}{after}$")
    return found


def _split_at_number(name: str, whole: bool) -> tuple[str, str, str]:
    """The name around its first number, escaped, unless `whole` without the outermost module: layers, 3, \\.mlp."""
    found = re.fullmatch(r"(.*?)\.(\d+)((?:\..*)?)", name)
    if not found:
        return re.escape(name if whole else name.partition(".")[2] or name), "", ""
    before = found[1] if whole else found[1].partition(".")[2] or found[1]
    return re.escape(before), found[2], re.escape(found[3])


def _alternatives(group: list[str], whole: bool) -> str:
    own = [name.rpartition(".")[2] for name in group]
    fused = [name for name, parts in FUSED if whole and set(own) <= set(parts)]
    names = [re.escape(name) for name in [*own, *fused]]
    return names[0] if len(names) == 1 else f"(?:{'|'.join(names)})"
