"""Options are checked when they are made, and survive JSON."""

import inspect
import json
import re
from dataclasses import fields
from typing import Any

import pytest

from gptq import InputError, QuantConfig
from gptq.cli.arguments import parser
from gptq.config import flags


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


def test_every_option_is_explained_and_has_a_flag_that_sets_it() -> None:
    arguments = (inspect.getdoc(QuantConfig) or "").partition("Args:")[2].partition("Raises:")[0]
    explained = re.findall(r"^ {4}(\w+): ", arguments, re.MULTILINE)
    assert explained == [one.name for one in fields(QuantConfig)] == [*flags(QuantConfig)]
    given = {"sym": False, "search": True, "desc_act": True, "two_streams": True, "static_groups": False,
             "lm_head": True, "pack_chats": False, "mixed": True}  # fmt: skip
    texts = {"method": "rtn", "effort": "best", "format": "gptq_v2", "overrides": "down_proj:bits=8",
             "num_samples": "auto", "damp_percent": "0.5", "target_bits": "3.5", "target_size": "3GB"}  # fmt: skip
    values = {
        **texts,
        "overrides": ["down_proj:bits=8"],
        "damp_percent": 0.5,
        "target_bits": 3.5,
        "target_size": 3 * 10**9,
    }
    for name, flag in flags(QuantConfig).items():
        text = [] if name in given else [texts.get(name, "7")]
        args = parser().parse_args(["quantize", "MODEL", "OUT", flag.name, *text])
        assert getattr(args, name) == {**given, **values}.get(name, 7), flag.name
        others = flags(QuantConfig).keys() - {name}
        assert not any(other in args for other in others)  # what is not given is left to QuantConfig
    assert parser().parse_args(["quantize", "MODEL", "OUT", "--no-search"]).search is False


@pytest.mark.parametrize(
    ("options", "damp"),
    [
        ({}, 0.01), ({"effort": "best"}, 0.1), ({"effort": "best", "tune_steps": 0}, 0.01), ({"tune_steps": 5}, 0.1),
        ({"tune_steps": 5, "damp_percent": 0.02}, 0.02),
    ],
)  # fmt: skip
def test_codes_that_are_tuned_afterwards_are_solved_with_more_damping(options: dict[str, Any], damp: float) -> None:
    assert QuantConfig(**options).damp_percent == damp


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        QuantConfig().bits = 3  # type: ignore[misc]
