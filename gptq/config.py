"""QuantConfig: all options that decide which bytes a run writes, each with its flag on the command line."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

from gptq.errors import InputError

Method = Literal["gptq", "rtn"]
METHODS: tuple[Method, ...] = get_args(Method)
EFFORTS: dict[str, dict[str, Any]] = {  # for each level, the values of the options that are not given
    "fast": {
        "search": True, "desc_act": True, "sweeps": 1, "two_streams": False, "tune_steps": 0, "polish_steps": 0,
    },
    "balanced": {
        "search": True, "desc_act": True, "sweeps": 2, "two_streams": True, "tune_steps": 0, "polish_steps": 0,
    },
    "best": {
        "search": True, "desc_act": True, "sweeps": 4, "two_streams": True, "tune_steps": 240, "polish_steps": 0,
    },
    "max": {
        "search": True, "desc_act": True, "sweeps": 4, "two_streams": True, "tune_steps": 300, "polish_steps": 200,
    },
}  # fmt: skip
Format = Literal[
    "gptq", "gptq_v2", "pack-quantized", "pack-quantized-a8", "int-quantized", "float-quantized", "fp8",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mlx", "gguf", "gguf-k", "gguf-iq4",
]  # fmt: skip
FORMATS: tuple[Format, ...] = get_args(Format)
BITS = range(2, 9)
UNSET: Any = None  # default of a field whose value follows from other fields
DEFAULT_GROUP_SIZE = 128
DEFAULT_BITS = 4
DAMP, TUNED_DAMP = 0.01, 0.1  # damp_percent without and with tune_steps, which move codes away from the solve's
SEEDS = 2**63
WIDTHS = {"int-quantized": 8, "float-quantized": 8, "fp8": 8}  # of formats that have one other width
GROUP_SIZES: dict[str, int] = {  # of formats that have one size
    "gguf": 32, "gguf-k": 32, "gguf-iq4": 32, "int-quantized": -1, "float-quantized": -1, "fp8": 128,
    "nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32,
}  # fmt: skip
TUNE_WINDOWS = 2  # calibration windows per gradient step of block tuning
TUNE_TOKENS = 2048  # windows that together have no more tokens are run together, there and by `polish`
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of forward passes
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
T = TypeVar("T")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


# --- options, written down once: the command line is made of them -----------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """How the command line asks for a field of QuantConfig.

    A boolean field with a default has one flag, which takes no value and sets the opposite of the default. If the
    default is None (`effort` decides) and the field is not a number, there is a flag `--x` and a flag `--no-x`.
    """

    name: str
    help: str
    metavar: str | None
    choices: tuple[str, ...] | None
    parse: Callable[[str], Any] | None  # the value from its text; None for a flag without a value


def option(
    default: T,
    help: str,  # noqa: A002
    *,
    flag: str = "",
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    parse: Callable[[str], Any] | None = None,
) -> T:
    """Return a field of QuantConfig with its default and its flag.

    Args:
        flag: name of the flag without the dashes; by default the name of the field.
        parse: converter of the flag's value; a flag without metavar and choices takes no value. By default the type of
            the field's default, or int if that is None.
    """
    if parse is None and (metavar or choices):
        parse = {int: parse_integer, float: parse_number, type(None): parse_integer}.get(type(default), str)
    made: T = field(default=default, metadata={"flag": Flag(flag, help, metavar, choices, parse)})
    return made


def flags(of: "type[QuantConfig] | type[PolishConfig]") -> dict[str, Flag]:
    """The flag of each field of a config, by the field's name."""
    named = {one.name: one.metadata["flag"] for one in fields(of)}
    return {name: replace(flag, name=f"--{(flag.name or name).replace('_', '-')}") for name, flag in named.items()}


def parse_count(text: str) -> int | Literal["auto"]:
    """A number of calibration windows, or "auto"; raises InputError."""
    if text == "auto":
        return "auto"
    _require(bool(re.fullmatch(r"\s*[+-]?\d+\s*", text)), f"{text!r} is neither a number nor 'auto'")
    return int(text)


def parse_size(text: str) -> int:
    """Bytes, from 3.5GB or 900MiB; raises InputError."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kKMGT]?)(i?)B?", text)
    if not found:
        raise InputError(f"{text!r} is not a size such as 3.5GB or 900MiB")
    power = "kMGT".find(found[2].replace("K", "k")) + 1 if found[2] else 0
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    _require(size > 0, f"{text!r} is no room at all; give a size such as 3.5GB or 900MiB")
    return size


def parse_integer(text: str) -> int:
    """A whole number; raises InputError."""
    _require(bool(re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text)), f"{text!r} is not a whole number")
    return int(text)


def parse_number(text: str) -> float:
    """A number; raises InputError."""
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{text!r} is not a number") from error


def parse_positive(text: str) -> int:
    """A whole number from 1 on; raises InputError."""
    number = parse_integer(text)
    _require(number >= 1, f"{text} is less than 1")
    return number


def require_device(device: str) -> None:
    """Raises InputError if `device` is no name of a device that is computed on."""
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", device)
    _require(bool(known), f"the device is {device!r}; it is auto, cpu, cuda, or cuda:N")


def require_dtype(dtype: str) -> None:
    """Raises InputError if `dtype` is no name of a dtype of forward passes."""
    _require(dtype in DTYPES, f"dtype is {dtype!r}; it is {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Override:
    """Options of the layers in whose names `pattern`, a regular expression, is found; options that are None stay.

    As text: `PATTERN:bits=8,group_size=32,sym=false`, or `PATTERN:skip` for layers that stay as they are.

    Raises:
        InputError: the pattern is not a regular expression, or an option is not valid.
    """

    pattern: str
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    skip: bool | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise InputError(f"override {self.pattern!r} is not a regular expression: {error}") from error
        for name, kind in (("bits", int), ("group_size", int), ("sym", bool), ("skip", bool)):
            value = getattr(self, name)
            right = value is None or type(value) is kind
            _require(right, f"override {self.pattern!r}: {name} is {value!r}; it is {KINDS.get(kind, kind.__name__)}")
        _require(bool(self.options()), f"override {self.pattern!r} changes nothing; give bits, group_size, sym or skip")
        _check_grid(self.bits, self.group_size, f"override {self.pattern!r}: ")

    def __str__(self) -> str:
        return f"{self.pattern}:{','.join(f'{name}={value}'.lower() for name, value in self.options().items())}"

    def options(self) -> dict[str, Any]:
        """Return the options that are set, by name."""
        return {name: value for name, value in asdict(self).items() if name != "pattern" and value is not None}

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Parse PATTERN:OPTIONS; raises InputError if `text` is something else."""
        pattern, colon, options = text.rpartition(":")
        _require(bool(colon and pattern), f"override {text!r} is not PATTERN:OPTIONS, such as 'down_proj:bits=8'")
        values: dict[str, Any] = {}
        for item in options.split(","):
            name, equals, value = item.strip().partition("=")
            values[name] = _value(value) if equals else True
        return cls.of((pattern, values))

    @classmethod
    def of(cls, value: Any) -> "Override":
        """An override from its text, or from a pair (pattern, options), as JSON holds it; raises InputError."""
        if isinstance(value, Override):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        try:
            pattern, options = value
            unknown = set(options) - {field.name for field in fields(cls)[1:]}
        except (TypeError, ValueError) as error:
            raise InputError(f"override {value!r} is not a pair of a pattern and options") from error
        known = "bits, group_size, sym and skip"
        _require(
            not unknown, f"override {pattern!r} has the unknown option {min(unknown, default='')!r}; it has {known}"
        )
        return cls(pattern, **options)


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _check_grid(bits: int | None, group_size: int | None, where: str = "") -> None:
    _require(bits is None or bits in BITS, f"{where}bits is {bits}; a code has 2 to 8 bits")
    _require(
        group_size is None or group_size == -1 or group_size >= 1,
        f"{where}group_size is {group_size}; it is -1 (a row is one group) or a number of inputs, such as 128",
    )


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a checkpoint is quantized.

    Args:
        bits: width of a weight's code, 2 to 8; GPTQ files hold 2, 3, 4 or 8 bits, pack-quantized files all widths.
        group_size: input columns that share one scale and zero point; -1 for one group per row. By default 128, in
            GGUF files what their blocks have, 32 or 16. If the group size does
            not divide a layer's inputs, the last group is shorter.
        sym: symmetric grid, the zero point in the middle; otherwise each group has its own zero point.
        effort: "fast", "balanced", "best" or "max"; sets those of the next six options that are None.
        search: take for each group the best of many grids, weighted by the Hessian's diagonal; otherwise the smallest
            grid that clips nothing.
        desc_act: quantize columns in descending order of the Hessian's diagonal ("act-order"). By default not with
            dynamic groups, where the file would need a group index at run time.
        sweeps: rounds of refitting scales and codes after the solve.
        two_streams: carry the original model's activations beside the quantized model's, and make up in each layer for
            what the layers before it have changed. Twice the forward passes.
        tune_steps: steps of gradient descent on each solved block's scales, codes, norms and biases. Each step takes
            two windows forward and back; needs the original's activations, that is two_streams.
        polish_steps: steps of gradient descent on the scales, norms, biases and embeddings of the whole quantized
            model, towards the original's predictions; what `gptq.polish` does, on the windows that calibrate. Needs
            memory for the whole packed model, and text.
        static_groups: fit all scales to the original weights before the first column is quantized, so that act-order
            needs no group index at run time; otherwise each group is fitted when its first column is reached, to
            weights that carry the compensation so far, and groups follow the order in which columns are quantized.
        method: "gptq", or "rtn" for round-to-nearest on the same grid without calibration.
        damp_percent: added to the Hessian's diagonal, as a fraction of its mean; by default 0.01, or 0.1 where
            tune_steps follow.
        num_samples: calibration windows; "auto" doubles them from 16 until, in the first block, the error on
            held-out windows is nearly that on the windows that the solver learned from.
        seq_len: tokens per window; shortened to the model's limit if the limit is smaller.
        pack_chats: fill each window with chats, one after another; otherwise each chat is a window of its own, without
            padding, cut at seq_len. Means nothing for texts, images and sound.
        seed: of the choice of calibration windows.
        format: of the file: "gptq" (v1), "gptq_v2", or compressed-tensors' "pack-quantized"; "auto" is the
            format that most engines read, given the other options.
        mixed: choose width and group size of each layer so that the block outputs change least, in the size that `bits`
            and `group_size` take with a zero point for each group, as GPTQ files have it.
        target_bits: like mixed, but a weight takes at most this many bits on average, scales and zero points included.
        target_size: like mixed, but the safetensors files take at most this many bytes.
        lm_head: quantize the output head too. If the head shares its weight with the embedding, the two are untied:
            the embedding stays, and the head gets codes of its own.
        overrides: options of single layers (or pairs of a pattern and options); if several name a layer, the last
            one wins. Layers that engines fuse into one (q/k/v, gate/up) always get the same options.

    Raises:
        InputError: an option is out of its range.
    """

    bits: int = option(UNSET, "2 to 8; by default 4, in files of 8-bit formats 8", metavar="N")
    group_size: int = option(
        UNSET,
        "inputs per scale; -1: one per row; by default 128, or what the format has, if it has one size",
        metavar="N",
    )
    sym: bool = option(True, "give every group a zero point of its own", flag="asym")
    effort: str = option(
        "balanced",
        "fast: one forward per window; balanced: two, and lower perplexity; best: blocks tuned as well, some ten "
        "times as long; max: tuned longer, and the whole model polished; the six below follow from it",
        choices=tuple(EFFORTS),
    )
    search: bool | None = option(None, "search each group's grid instead of taking one without clipping")
    desc_act: bool | None = option(None, "quantize inputs with large activations first (act-order)")
    sweeps: int | None = option(None, "rounds of refitting scales and codes after the solve", metavar="N")
    two_streams: bool | None = option(None, "make up for what earlier layers have changed")
    tune_steps: int | None = option(None, "steps of gradient descent on each solved block", metavar="N")
    polish_steps: int | None = option(None, "steps of gradient descent on the whole model at the end", metavar="N")
    static_groups: bool = option(
        True, "fit scales as columns are reached; with --desc-act this needs g_idx", flag="dynamic-groups"
    )
    method: Method = option(  # noqa: RUF009 (the default is a str, so sharing it is safe)
        "gptq",
        "rtn: round to nearest, without calibration, so that --effort and what follows from it mean nothing",
        choices=METHODS,
    )
    damp_percent: float = option(
        UNSET,
        "fraction of the Hessian's mean diagonal; by default 0.01, and 0.1 with tune steps",
        metavar="X",
        parse=parse_number,
    )
    num_samples: int | Literal["auto"] = option(
        128, "calibration windows; auto: as many as pay", flag="samples", metavar="N", parse=parse_count
    )
    seq_len: int = option(2048, "tokens per window", metavar="N")
    pack_chats: bool = option(
        True, "each chat is a window of its own, without padding, instead of filling windows up", flag="one-chat-each"
    )
    seed: int = option(0, "of the choice of windows", metavar="N")
    format: Literal["auto", Format] = option(
        "auto",
        "of the file; auto is what most engines take. Given several times, the result is written in each format, into "
        "OUT/FORMAT; they need the same grid",
        choices=("auto", *FORMATS),
    )
    mixed: bool = option(
        False, "choose width and group size of each layer, in the size that --bits and --group-size take"
    )
    target_bits: float | None = option(
        None, "mixed widths: bits per weight on the average", metavar="X", parse=parse_number
    )
    target_size: int | None = option(
        None, "mixed widths: of the files, such as 3.5GB", metavar="SIZE", parse=parse_size
    )
    lm_head: bool = option(False, "quantize the output head too, untied from the embedding where it was tied")
    overrides: tuple[Override, ...] = option(
        (),
        "options of the layers in whose names RE is found: 'down_proj:bits=8,group_size=32', 'layers.0.:skip'; may be "
        "repeated, later ones win",
        flag="override",
        metavar="RE:OPTS",
    )

    def __post_init__(self) -> None:
        _require(
            isinstance(self.overrides, tuple | list), f"overrides is {self.overrides!r}; it is a tuple of overrides"
        )
        object.__setattr__(self, "overrides", tuple(Override.of(value) for value in self.overrides))
        _require(self.effort in EFFORTS, f"effort is {self.effort!r}; it is one of {', '.join(EFFORTS)}")
        levels = EFFORTS[self.effort] | ({} if self.static_groups else {"desc_act": False})
        levels["bits"] = WIDTHS.get(str(self.format), DEFAULT_BITS)
        levels["group_size"] = GROUP_SIZES.get(str(self.format), DEFAULT_GROUP_SIZE)
        tunes = levels["tune_steps"] if self.tune_steps is None else self.tune_steps
        levels["damp_percent"] = TUNED_DAMP if tunes else DAMP
        for name, value in levels.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_target()
        for one in fields(self):
            if one.name.startswith("target_") or (one.name, getattr(self, one.name)) == ("num_samples", "auto"):
                continue
            value, kind = getattr(self, one.name), type(levels.get(one.name, one.default))
            number = kind is float and type(value) is int
            _require(type(value) is kind or number, f"{one.name} is {value!r}; it is {KINDS.get(kind, kind.__name__)}")
        _check_grid(self.bits, self.group_size)
        _require(self.method in ("gptq", "rtn"), f"method is {self.method!r}; it is 'gptq' or 'rtn'")
        _require(
            self.format in ("auto", *FORMATS),
            f"format is {self.format!r}; it is 'auto', {', '.join(map(repr, FORMATS))}",
        )
        _require(
            0 < self.damp_percent < 1,
            f"damp_percent is {self.damp_percent}; it is a fraction between 0 and 1, usually 0.01",
        )
        _require(self.sweeps is not None and self.sweeps >= 0, f"sweeps is {self.sweeps}; it is 0 or more")
        _require(
            self.tune_steps is not None and self.tune_steps >= 0, f"tune_steps is {self.tune_steps}; it is 0 or more"
        )
        _require(
            self.polish_steps is not None and self.polish_steps >= 0,
            f"polish_steps is {self.polish_steps}; it is 0 or more",
        )
        _require(
            bool(self.two_streams) or not self.tune_steps,
            "tune_steps needs two_streams: it aims at the original outputs",
        )
        _require(
            self.num_samples == "auto" or self.num_samples >= 1,
            f"num_samples is {self.num_samples}; at least one window is needed",
        )
        _require(self.seq_len >= 2, f"seq_len is {self.seq_len}; a window has at least 2 tokens")
        _require(0 <= self.seed < SEEDS, f"seed is {self.seed}; it is from 0 to 2^63 - 1")

    def _check_target(self) -> None:
        bits, size = self.target_bits, self.target_size
        targets = {"mixed": self.mixed, "target_bits": bits is not None, "target_size": size is not None}
        given = [name for name, is_given in targets.items() if is_given]
        _require(len(given) < 2, f"{' and '.join(given)} are given; one of them is enough")
        _require(
            bits is None or (type(bits) in (int, float) and bits > 0),
            f"target_bits is {bits!r}; it is a positive number",
        )
        _require(size is None or (type(size) is int and size > 0), f"target_size is {size!r}; it is a number of bytes")
        _require(
            not given or (self.method == "gptq" and self.static_groups),
            f"{''.join(given)} needs the method 'gptq' and static groups: widths are chosen by what layers do to their "
            "block",
        )

    @property
    def chooses_widths(self) -> bool:
        """Whether each layer has a width and a group size of its own."""
        return self.mixed or self.target_bits is not None or self.target_size is not None

    @property
    def streams(self) -> int:
        """Forward passes of a calibration window: one through the quantized model, with two_streams one more."""
        return 2 if self.two_streams else 1

    @property
    def shuffles_groups(self) -> bool:
        """Whether groups follow the order in which columns are quantized, so that readers need g_idx."""
        return self.method == "gptq" and bool(self.desc_act) and not self.static_groups

    def to_dict(self) -> dict[str, Any]:
        """JSON's values; overrides are pairs of a pattern and options."""
        overrides = [[override.pattern, override.options()] for override in self.overrides]
        return {**asdict(self), "overrides": overrides}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantConfig":
        """The inverse of `to_dict`; an unknown key is refused by name."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        _require(not unknown, f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


@dataclass(frozen=True)
class PolishConfig:
    """Options of `gptq.polish` that decide which bytes it writes.

    Args:
        steps: of Adam, each on two windows; fewer are taken once the held-out windows no longer gain.
        num_samples: calibration windows. More than a quantization takes pay here.
        seq_len, seed: as for `QuantConfig`.

    Raises:
        InputError: an option is out of its range.
    """

    steps: int = option(200, "of gradient descent on the whole model", metavar="N")
    num_samples: int = option(256, "calibration windows; one in eight measures", flag="samples", metavar="N")
    seq_len: int = option(2048, "tokens per window", metavar="N")
    seed: int = option(0, "of the choice of windows", metavar="N")

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("num_samples", 8), ("seq_len", 2)):
            value = getattr(self, name)
            _require(
                type(value) is int and least <= value < 2**40, f"{name} is {value!r}; it is from {least} to 2^40 - 1"
            )
        _require(type(self.seed) is int and 0 <= self.seed < SEEDS, f"seed is {self.seed!r}; it is from 0 to 2^63 - 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
