"""What the file formats of compressed-tensors have in common: `quantization_config`, and the weight's integer options.

The `quantization_config` in config.json gives groups of targets (names, `re:` expressions, or the class Linear) and a
list of what to ignore. A group describes its weights, and the activations if these are rounded at run time. The word
after `format` says how the weights lie in the file.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gptq.checkpoint.json_objects import Options, read_options
from gptq.config import QuantConfig
from gptq.errors import InputError, UnknownOptionError
from gptq.formats.format import FileFormat
from gptq.formats.name_rules import Quantization, check_expression, name_patterns
from gptq.formats.scheme import Linears, Scheme, names_by_scheme

METHOD = "compressed-tensors"
CONFIG_KEYS = (  # entries of a config that are known; those of `_Config` decide how a file is read
    "config_groups format ignore quantization_status kv_cache_scheme global_compression_ratio version dequantize "
    "run_compressed use_optimized_inference"
)
NOT_COMPUTED: dict[str, tuple[str, tuple[Any, ...]]] = {  # keys, why they are refused, and formats that are not
    "transform_config": ("rotations of activations while the model runs are not computed here", ()),
    "sparsity_config": ("sparse weights are not read", (None, "dense")),
}
MIXED = "mixed-precision"  # the word for a file in several formats
INT8_PER_TOKEN = {  # input_activations: each token rounded to int8 with a scale of its own, at run time
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True,
    "observer": None, "actorder": None,
}  # fmt: skip


class CompressedTensors(FileFormat):
    """A format of compressed-tensors."""

    quant_method = METHOD
    stored_as: str  # what the file calls the format; two of ours may share it
    usage = (
        "from transformers import AutoModelForCausalLM  # with compressed-tensors installed",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this repository")',
    )
    has_g_idx = False
    inputs_first = False
    needs_whole_words = False
    keeps_scale_dtype = True

    def refusal(self, scheme: Scheme, outputs: int, inputs: int, transposed: bool) -> str | None:
        if transposed:
            return "compressed-tensors reads nn.Linear, and this layer is a Conv1D"
        if scheme.scattered:
            return "compressed-tensors has no g_idx any more, which act-order with dynamic groups needs"
        if inputs % scheme.columns(inputs):
            return f"compressed-tensors needs whole groups, and {scheme.group_size} does not divide the {inputs} inputs"
        return None

    @abstractmethod
    def describe_weights(self, scheme: Scheme) -> dict[str, Any]:
        """Return a group's `weights`."""

    @abstractmethod
    def read_weights(self, where: str, weights: Mapping[str, Any]) -> Scheme:
        """Return the scheme that a group's `weights` describe; raises InputError if the format has no such weights."""

    def write_config(self, linears: Linears, config: QuantConfig | None) -> dict[str, Any]:
        names, by_scheme = [*linears.layers, *linears.kept], names_by_scheme(linears.layers)
        groups: dict[str, Any] = {}
        for number, (scheme, chosen) in enumerate(by_scheme.items()):
            targets = (
                ["Linear"] if len(by_scheme) == 1 else [f"re:{pattern}" for pattern in name_patterns(chosen, names)]
            )
            groups[f"group_{number}"] = {
                "targets": targets,
                "weights": self.describe_weights(scheme),
                "input_activations": dict(INT8_PER_TOKEN) if self.activation_bits else None,
                "output_activations": None,
                "format": self.stored_as,
            }
        return {
            "quant_method": METHOD,
            "format": self.stored_as,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*(f"re:{pattern}" for pattern in name_patterns(linears.kept, names)), *linears.others],
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
        }

    def read_config(
        self, where: str | Path, quantization: Mapping[str, Any], family: Sequence[FileFormat]
    ) -> Quantization:
        known = [one for one in family if isinstance(one, CompressedTensors)]
        _check_keys(str(where), quantization)
        read = read_options(_Config, quantization, str(where))
        _require_word(where, read.format, known)
        exact: list[tuple[str, Scheme | None]] = []
        expressions: list[tuple[str, Scheme | None]] = []
        everywhere: Scheme | None = None
        schemes: list[Scheme] = []
        for name, values in read.config_groups.items():
            group = read_options(_Group, values, f"{where}, {name},")
            scheme = _read_scheme(f"{where}, {name},", group, read.format, known)
            schemes.append(scheme)
            for target in _checked_targets(where, group.targets):
                if target == "Linear":
                    everywhere = scheme
                elif target.startswith("re:"):
                    expressions.append((target[3:], scheme))
                else:
                    exact.append((f"{re.escape(target)}$", scheme))
        ignored = [
            (target[3:] if target.startswith("re:") else f"{re.escape(target)}$", None)
            for target in _checked_targets(where, read.ignore)
        ]
        return Quantization(schemes[0].format, everywhere, (*ignored, *exact, *expressions))


def describe_integers(scheme: Scheme) -> dict[str, Any]:
    """Return the `weights` of a group whose codes are integers."""
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "actorder": None,
        "dynamic": False,
        "observer": "minmax",
    }


def describe_floats(bits: int, strategy: str, group_size: int | None) -> dict[str, Any]:
    """Return the `weights` of a group whose codes are floating-point numbers."""
    return {
        "num_bits": bits,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "actorder": None,
        "dynamic": False,
        "observer": "minmax",
    }


# --- quantization_config ----------------------------------------------------------------------------------------------


def _check_keys(where: str, quantization: Mapping[str, Any]) -> None:
    """Check what transformers takes and then does not compute, or does not know.

    Raises:
        UnknownOptionError: the message names the key.
    """
    if unknown := sorted(quantization.keys() - {"quant_method", *CONFIG_KEYS.split(), *NOT_COMPUTED}):
        raise UnknownOptionError(f"{where} has the key {unknown[0]!r}, which is not known of {METHOD!r}")
    for key, (asked, harmless) in NOT_COMPUTED.items():
        value = quantization.get(key)
        if value and not (isinstance(value, dict) and value.get("format") in harmless):
            raise UnknownOptionError(f"{where} says {key} {str(value)[:80]!r}; {asked}")


def _require_nothing(value: Any) -> None:
    if value:
        raise ValueError("something")


def _require_int(kind: str) -> str:
    if kind != "int":
        raise ValueError("type")
    return kind


def _require_8_bits_per_token(values: Any) -> bool:
    """Whether there are `input_activations`, if they are those of INT8_PER_TOKEN."""
    if not values:
        return False
    same = ("num_bits", "type", "symmetric", "strategy", "dynamic")
    if not isinstance(values, dict) or any(values.get(key) != INT8_PER_TOKEN[key] for key in same):
        raise ValueError("activations")
    return True


Targets = Annotated[list[str], BeforeValidator(lambda listed: listed or [])]
Nothing = Annotated[Any, AfterValidator(_require_nothing)]
Rounded = Annotated[bool, BeforeValidator(_require_8_bits_per_token)]


class _Config(Options):
    format: str = Field(description="it is the name of a format")
    config_groups: Annotated[dict[str, Any], Field(min_length=1)] = Field(
        description="it is an object that holds groups"
    )
    ignore: Targets = Field([], description="it is a list of names")


class _Group(Options):
    targets: Targets = Field([], description="it is a list of names")
    weights: Annotated[dict[str, Any], BeforeValidator(lambda weights: weights or {})] = Field(
        {}, description="it is an object"
    )
    input_activations: Rounded = Field(
        False, description="weights alone are read, or with activations of int8 per token, symmetric and dynamic"
    )
    output_activations: Nothing = Field(None, description="only weights and input activations are read")
    format: str | None = Field(None, description="it is the name of a format")


class IntegerWeights(Options):
    """A group's `weights` whose codes are integers."""

    num_bits: Annotated[int, Field(ge=1, le=8)] = Field(description="1 to 8 bits are read")
    type: Annotated[str, AfterValidator(_require_int)] = Field("int", description="codes of 'int' are read")
    strategy: Any = None
    group_size: Any = None
    symmetric: bool = Field(True, description="it is true or false")
    actorder: Any = None

    @property
    def columns(self) -> int:
        """Columns per group, -1 for one group per row."""
        size: int = -1 if self._strategy == "channel" else self.group_size
        return size

    @property
    def _strategy(self) -> Any:
        return self.strategy or ("channel" if self.group_size in (-1, None) else "group")

    @property
    def is_scattered(self) -> bool:
        """Whether groups are not runs of columns."""
        return self.actorder in ("group", "dynamic", True)

    @model_validator(mode="after")
    def _require_size(self) -> "IntegerWeights":
        strategy, columns = self._strategy, self.columns
        if strategy not in ("group", "channel") or type(columns) is not int or columns < -1 or columns == 0:
            said = f"strategy {strategy!r}, group_size {self.group_size!r}"
            raise ValueError(f"says {said}; a 'group' has a size, or it is a 'channel'")
        return self


def _require_float(kind: str) -> str:
    if kind != "float":
        raise ValueError("type")
    return kind


class FloatWeights(Options):
    """A group's `weights` whose codes are floating-point numbers."""

    num_bits: Annotated[int, Field(ge=1, le=8)] = Field(description="1 to 8 bits are read")
    type: Annotated[str, AfterValidator(_require_float)] = Field(description="codes of 'float' are read")
    strategy: str | None = Field(None, description="it is the name of a strategy")
    group_size: int | None = Field(None, description="it is a number of inputs")
    symmetric: bool = Field(True, description="it is true or false")


def _require_word(where: str | Path, word: str, known: Sequence[CompressedTensors]) -> None:
    words = dict.fromkeys(one.stored_as for one in known)
    if word not in (*words, MIXED):
        listed = ", ".join(map(repr, words))
        raise InputError(
            f"{where} says format {word[:80]!r}; of compressed-tensors files those in the formats {listed} are read"
        )


def _read_scheme(where: str, group: _Group, word: str, known: Sequence[CompressedTensors]) -> Scheme:
    """Return the scheme of a group's layers, in the format that its word and its activations name.

    Raises:
        InputError: no format that is read has this word with such activations.
    """
    word = group.format or word
    _require_word(where, word, known)
    named = [one for one in known if one.stored_as == word]
    found = [one for one in named if bool(one.activation_bits) is group.input_activations]
    if not found and word != MIXED:
        wanted = "int8 activations per token" if named[0].activation_bits else "no input_activations"
        raise InputError(f"{where} is {word!r}; such a group is read with {wanted}")
    if not found:
        raise InputError(f"{where} does not say its format, though the file has several")
    return found[0].read_weights(where, group.weights)


def _checked_targets(where: str | Path, targets: list[str]) -> list[str]:
    for target in targets:
        if target.startswith("re:"):
            check_expression(where, target[3:])
    return targets
