"""`quantization_config`: what a checkpoint says of how each layer is stored, written and read.

GPTQ files give one scheme for all layers and `dynamic` rules for the others: regular expressions that readers match
from the start of a layer's name, the first match wins, `-:` in front means "not quantized". compressed-tensors files
give groups of targets (names, `re:` expressions, or the class Linear) and a list of what to ignore. vLLM makes one
layer of q/k/v and of gate/up and looks for the name of that one
(vllm/model_executor/layers/quantization/utils/gptq_utils.py), others for the single names, so expressions match both.
"""

import math
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import regex

from gptq.checkpoint.untrusted import read_json
from gptq.config import Format
from gptq.errors import InputError
from gptq.formats.codec import Scheme
from gptq.models.blocks import FUSED, fused_siblings

GPTQ_FORMATS: tuple[Format, ...] = ("gptq", "gptq_v2")
QUANTIZE_CONFIG = "quantize_config.json"
PATIENCE = 60.0  # seconds of the processor for all rules on all layers; 10,000 layers and 100 rules take four
MAX_EXPRESSION, MAX_REPEATS = 100_000, 1000  # characters of an expression, and product of its {counts}
Layers = Mapping[str, tuple[Scheme, int]]  # scheme and inputs of quantized layers, by their names in the checkpoint


@dataclass(frozen=True)
class Quantization:
    """What a `quantization_config` says; `rules` come before `everywhere`, None stands for "not quantized"."""

    format: Format
    everywhere: Scheme | None
    rules: tuple[tuple[str, Scheme | None], ...] = ()

    def schemes(self, layers: Iterable[str]) -> dict[str, Scheme | None]:
        """Of the layers with these names.

        Raises:
            InputError: a rule does not come to an end; some expressions take time exponential in a name's length.
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


# --- writing ----------------------------------------------------------------------------------------------------------


def most_common(layers: Layers) -> Scheme:
    """The scheme of most weights' layers; of those alike in number, the one that comes first."""
    counts: dict[Scheme, int] = {}
    for scheme, inputs in layers.values():
        whole = on(scheme, inputs)
        counts[whole] = counts.get(whole, 0) + 1
    return max(counts, key=lambda scheme: counts[scheme])


def on(scheme: Scheme, inputs: int) -> Scheme:
    """The same with group size -1 where a group is a row, so that what is stored alike is equal."""
    return scheme if scheme.columns(inputs) < inputs else replace(scheme, group_size=-1, scattered=False)


def gptq_config(
    everywhere: Scheme, layers: Layers, kept: Collection[str], extra: Mapping[str, Any], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The `quantization_config` of a GPTQ file for config.json, also written as quantize_config.json.

    `desc_act` says what readers take it for: that groups are not runs of columns, so that g_idx has to be used.

    Args:
        everywhere: scheme of the layers that no rule names.
        layers: scheme and inputs of every quantized layer, by its name in the checkpoint.
        kept: layers beside the quantized ones that stay as they are.
        extra, meta: what else is said, of all layers and of how the file was made.
    """
    rules = dynamic_rules(everywhere, layers, kept)
    return {
        "quant_method": "gptq",
        "checkpoint_format": everywhere.format,
        "bits": everywhere.bits,
        "group_size": everywhere.group_size,
        "sym": everywhere.sym,
        "desc_act": everywhere.scattered,
        "lm_head": any(not re.search(r"\.\d+\.", f".{name}.") for name in layers),
        **extra,
        **({"dynamic": rules} if rules else {}),
        "meta": dict(meta),
    }


def dynamic_rules(everywhere: Scheme, layers: Layers, kept: Collection[str]) -> dict[str, dict[str, Any]]:
    """Rules for the layers whose scheme `everywhere` does not describe, and for those that stay as they are."""
    names = [*layers, *kept]
    rules: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in patterns(kept, names)}
    for scheme, chosen in _by_scheme(layers).items():
        own = [name for name in chosen if on(everywhere, layers[name][1]) != scheme]
        values = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
        if scheme.scattered != everywhere.scattered and scheme.group_size != -1:
            values["desc_act"] = scheme.scattered
        rules |= {f"+:{pattern}": values for pattern in patterns(own, names)}
    return rules


def _by_scheme(layers: Layers) -> dict[Scheme, list[str]]:
    found: dict[Scheme, list[str]] = {}
    for name, (scheme, inputs) in layers.items():
        found.setdefault(on(scheme, inputs), []).append(name)
    return found


def pack_quantized_config(layers: Layers, kept: Collection[str], other_linears: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a compressed-tensors file.

    Args:
        kept: layers beside the quantized ones that stay as they are.
        other_linears: names of every other nn.Linear of the model, lm_head for one.
    """
    names = [*layers, *kept]
    by_scheme = _by_scheme(layers)
    groups: dict[str, Any] = {}
    for number, (scheme, chosen) in enumerate(by_scheme.items()):
        targets = ["Linear"] if len(by_scheme) == 1 else [f"re:{pattern}" for pattern in patterns(chosen, names)]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.sym,
                "strategy": "channel" if scheme.group_size == -1 else "group",
                "group_size": None if scheme.group_size == -1 else scheme.group_size,
                "actorder": None,
                "dynamic": False,
                "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*(f"re:{pattern}" for pattern in patterns(kept, names)), *other_linears],
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
    }


def patterns(chosen: Collection[str], layers: Collection[str]) -> list[str]:
    """Regular expressions that match, of `layers`, the chosen ones, and what engines call those they fuse.

    The outermost module's name is left open, because checkpoints and engines differ in it, unless it tells chosen
    layers from others (an encoder's from a decoder's).
    """
    found = _patterns(chosen, layers, whole=False)
    others = set(layers) - set(chosen)
    clash = any(re.match(pattern, other) for pattern in found for other in others)
    return _patterns(chosen, layers, whole=True) if clash else found


def _patterns(chosen: Collection[str], layers: Collection[str], whole: bool) -> list[str]:
    numbers: dict[tuple[str, str], list[str]] = {}  # (before and after the number of the block) -> numbers
    complete = {frozenset(group) for group in fused_siblings(layers) if len(group) > 1}
    for group in fused_siblings(chosen):
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


# --- reading ----------------------------------------------------------------------------------------------------------


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint folder as it stands there, or None if it is not quantized.

    It is in config.json; AutoGPTQ used to write quantize_config.json only, and where both are there they have to agree.

    Raises:
        InputError: a file cannot be read, or they differ in what decides how tensors are read.
    """
    config, beside = folder / "config.json", folder / QUANTIZE_CONFIG
    within = read_json(config).get("quantization_config")
    if not isinstance(within, dict | None):
        raise InputError(f"{config} has {within!r} for its quantization_config, not an object")
    own = read_json(beside) if beside.is_file() else None
    if within is None or own is None:
        return within or own
    for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format"):
        if key in own and key in within and own[key] != within[key]:
            raise InputError(f"{beside} says {key} {own[key]!r}, but config.json beside it says {within[key]!r}")
    return dict(within)


def read_quantization(where: str | Path, quantization: Mapping[str, Any]) -> Quantization:
    """What a `quantization_config`, found in the file or folder `where`, says.

    Raises:
        InputError: it is of another format, or lacks a value, or contradicts itself.
    """
    method = quantization.get("quant_method", "gptq")  # early AutoGPTQ did not say
    if method == "compressed-tensors":
        return _read_compressed_tensors(where, quantization)
    said = {key: quantization[key] for key in ("checkpoint_format", "format") if quantization.get(key) is not None}
    kinds: list[Format] = [kind for kind in GPTQ_FORMATS if kind in said.values()]
    if method != "gptq" or any(value not in GPTQ_FORMATS for value in said.values()):
        raise InputError(
            f"{where} says quant_method {method!r}, format {' and '.join(map(repr, said.values())) or 'nothing'}; what "
            "is read is 'gptq' (format 'gptq' or 'gptq_v2') and 'compressed-tensors' (format 'pack-quantized')"
        )
    if len(kinds) > 1:
        raise InputError(f"{where} contradicts itself: {said}")
    return _read_gptq(where, quantization, kinds[0] if kinds else "gptq")


def _read_gptq(where: str | Path, quantization: Mapping[str, Any], kind: Format) -> Quantization:
    meta = quantization.get("meta")
    makers = meta.get("quantizer", ()) if isinstance(meta, dict) else ()
    by_gptqmodel = kind == "gptq" and any(str(maker).startswith("gptqmodel") for maker in _as_list(makers))
    everywhere = _gptq_scheme(where, quantization, kind, by_gptqmodel)
    rules: list[tuple[str, Scheme | None]] = []
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(options, dict) for options in dynamic.values()):
        raise InputError(f"{where} says dynamic {dynamic!r}; it holds rules by expression, each an object of options")
    for rule, options in dynamic.items():
        pattern = re.sub(r"^[+-]:", "", rule)
        _check_expression(f"{where}, dynamic", pattern)
        if rule.startswith("-:"):
            rules.append((pattern, None))
        else:
            merged = {**quantization, **options}
            rules.append((pattern, _gptq_scheme(f"{where}, dynamic {rule!r},", merged, kind, by_gptqmodel)))
    return Quantization(kind, everywhere, tuple(rules))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _gptq_scheme(where: str | Path, values: Mapping[str, Any], kind: Format, by_gptqmodel: bool) -> Scheme:
    bits, group_size = values.get("bits"), values.get("group_size")
    sym, desc_act = values.get("sym", False), values.get("desc_act", False)  # without `sym`, zero points are read
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        raise InputError(f"{where} says bits {bits!r}; GPTQ files hold 2, 3, 4 or 8")
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise InputError(f"{where} says group_size {group_size!r}; it is -1 or a number of columns")
    if type(sym) is not bool or type(desc_act) is not bool:
        raise InputError(f"{where} says sym {sym!r} and desc_act {desc_act!r}; each is true or false")
    return Scheme(bits, group_size, sym, kind, desc_act, by_gptqmodel)


def _read_compressed_tensors(where: str | Path, quantization: Mapping[str, Any]) -> Quantization:
    kind, groups = quantization.get("format"), quantization.get("config_groups")
    if kind not in ("pack-quantized", "mixed-precision") or not isinstance(groups, dict) or not groups:
        raise InputError(
            f"{where} says format {kind!r} with {len(groups) if isinstance(groups, dict) else 'no'} config_groups; "
            "of compressed-tensors files those in 'pack-quantized' format are read"
        )
    exact: list[tuple[str, Scheme | None]] = []
    expressions: list[tuple[str, Scheme | None]] = []
    everywhere: Scheme | None = None
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise InputError(f"{where} has {group!r} for {name}, not an object")
        scheme = _group_scheme(f"{where}, {name},", group)
        for target in _targets(where, group.get("targets", ())):
            if target == "Linear":
                everywhere = scheme
            elif target.startswith("re:"):
                expressions.append((target[3:], scheme))
            else:
                exact.append((f"{re.escape(target)}$", scheme))
    ignored = [
        t[3:] if t.startswith("re:") else f"{re.escape(t)}$" for t in _targets(where, quantization.get("ignore"))
    ]
    return Quantization("pack-quantized", everywhere, (*((t, None) for t in ignored), *exact, *expressions))


def _targets(where: str | Path, listed: Any) -> list[str]:
    targets = listed or []
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{where} has the targets or exceptions {listed!r}, which are not a list of names")
    for target in targets:
        if target.startswith("re:"):
            _check_expression(where, target[3:])
    return list(targets)


def _check_expression(where: str | Path, pattern: str) -> None:
    """Raises InputError for what is no regular expression, or takes gigabytes when it is compiled."""
    counts = [int(number) for number in re.findall(r"\d{1,9}", "".join(re.findall(r"\{[\d,]*\}", pattern)))]
    if len(pattern) > MAX_EXPRESSION or math.prod(max(count, 1) for count in counts) > MAX_REPEATS:
        raise InputError(f"{where}: the regular expression {pattern[:80]!r} is too large")
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: {pattern[:80]!r} is not a regular expression: {error}") from error


def _group_scheme(where: str, group: Mapping[str, Any]) -> Scheme:
    """Raises InputError for what is not weights of integers in groups or rows."""
    weights = group.get("weights") or {}
    if not isinstance(weights, dict):
        raise InputError(f"{where} has {weights!r} for its weights, not an object")
    bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    strategy = strategy or ("channel" if size in (-1, None) else "group")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise InputError(f"{where} quantizes {key.replace('_', ' ')}; only weights are read")
    if group.get("format") not in (None, "pack-quantized"):
        raise InputError(f"{where} says format {group['format']!r}; 'pack-quantized' is read")
    if weights.get("type", "int") != "int" or type(bits) is not int or not 1 <= bits <= 8:
        raise InputError(
            f"{where} says num_bits {bits!r} of type {weights.get('type')!r}; 1 to 8 bits of 'int' are read"
        )
    columns = -1 if strategy == "channel" else size
    if strategy not in ("group", "channel") or type(columns) is not int or columns < -1 or columns == 0:
        raise InputError(f"{where} says strategy {strategy!r}, group_size {size!r}; a 'group' has a size, or 'channel'")
    scattered = weights.get("actorder") in ("group", "dynamic", True)
    symmetric = weights.get("symmetric", True)
    if type(symmetric) is not bool:
        raise InputError(f"{where} says symmetric {symmetric!r}; it is true or false")
    return Scheme(bits, columns, symmetric, "pack-quantized", scattered)
