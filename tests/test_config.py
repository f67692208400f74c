"""Options are checked when they are made, and survive JSON."""

import json
from typing import Any

import pytest

from gptq import InputError, QuantConfig


def test_json_both_ways() -> None:
    config = QuantConfig(bits=3, group_size=-1, sym=False, seed=7)
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(InputError, match="wbits"):
        QuantConfig.from_dict({"wbits": 4})


@pytest.mark.parametrize(
    ("option", "value"),
    [("bits", 9), ("bits", 1), ("format", "awq"),
     ("bits", 0), ("group_size", 0), ("group_size", -2), ("damp_percent", 0.0), ("damp_percent", 1.5),
     ("num_samples", 0), ("seq_len", 1), ("method", "awq"), ("seed", -1), ("damp_percent", float("nan")),
     ("bits", 4.0), ("sym", "no"), ("seed", None)],
)  # fmt: skip
def test_an_option_out_of_range_is_named_with_its_value(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{option} is '?{value}"):
        QuantConfig(**{option: value})


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        QuantConfig().bits = 3  # type: ignore[misc]
