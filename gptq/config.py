"""QuantConfig: everything that decides which bytes come out, and nothing else."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from gptq.errors import InputError

Method = Literal["gptq", "rtn"]


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a checkpoint is quantized.

    Args:
        bits: width of a weight's code: 2, 3, 4 or 8, the widths GPTQ v1 files have.
        group_size: input columns that share one scale and zero point; -1 for one group per row. Where it does not
            divide a layer's inputs, the last group is shorter.
        sym: symmetric grid, the zero point in the middle; otherwise each group has its own zero point.
        desc_act: quantize columns in descending order of the Hessian's diagonal ("act-order").
        static_groups: fit all scales to the original weights before the first column is quantized, so that act-order
            needs no group index at run time; otherwise each group is fitted when its first column is reached, to
            weights that carry the compensation so far, and groups follow the order in which columns are quantized.
        method: "gptq", or "rtn" for round-to-nearest on the same grid without calibration.
        damp_percent: added to the Hessian's diagonal, as a fraction of its mean (0.01 is 1 %).
        num_samples: calibration windows.
        seq_len: tokens per window; shortened to the model's limit where that is smaller.
        seed: of the choice of calibration windows.

    Raises:
        InputError: an option is out of its range.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = True
    method: Method = "gptq"
    damp_percent: float = 0.01
    num_samples: int = 128
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            number = kind is float and type(value) is int
            _require(type(value) is kind or number, f"{field.name} is {value!r}; it has to be of type {kind.__name__}")
        _require(self.bits in (2, 3, 4, 8), f"bits is {self.bits}; GPTQ v1 files hold 2, 3, 4 or 8 bits")
        _require(
            self.group_size == -1 or self.group_size >= 1,
            f"group_size is {self.group_size}; it is -1 (a row is one group) or a number of inputs, such as 128",
        )
        _require(self.method in ("gptq", "rtn"), f"method is {self.method!r}; it is 'gptq' or 'rtn'")
        _require(
            0 < self.damp_percent < 1,
            f"damp_percent is {self.damp_percent}; it is a fraction between 0 and 1, usually 0.01",
        )
        _require(self.num_samples >= 1, f"num_samples is {self.num_samples}; at least one window is needed")
        _require(self.seq_len >= 2, f"seq_len is {self.seq_len}; a window has at least 2 tokens")
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}; it is from 0 to 2^63 - 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantConfig":
        """The inverse of `to_dict`; an unknown key is refused by name."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        _require(not unknown, f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)
