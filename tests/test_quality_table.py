"""The table of quality against size: what it measures, and that it goes on where it stopped."""

import json
from pathlib import Path

import pytest

from gptq import compare, config, quantize
from tests.conftest import MakeModel, load_script

script = load_script("quality_table")


def test_every_preset_is_a_configuration_and_plain_gptq_pins_what_it_means() -> None:
    for options in script.PRESETS.values():
        config.QuantConfig(**options)
    plain = config.QuantConfig(**script.PRESETS[script.PLAIN])
    levers = plain.search, plain.desc_act, plain.sweeps, plain.two_streams, plain.tune_steps
    assert levers == (False, False, 0, False, 0)


def test_the_table_agrees_with_the_package_and_goes_on_where_it_stopped(
    make_model: MakeModel,
    text_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, file = make_model("llama"), tmp_path / "table.json"
    options = ["--bits", "3", "--group-sizes", "32", "--samples", "4", "--seq-len", "32", "--windows", "5"]
    command = [str(source), "--calibration", text_file, "--data", text_file, "--json", str(file), *options]

    def run(*more: str) -> int:
        monkeypatch.setattr("sys.argv", ["quality_table.py", *command, *more])
        code: int = script.main()
        return code

    assert run("--methods", "rtn") == 0
    (row,) = json.loads(file.read_text())["rows"]
    made = quantize(source, tmp_path / "out", config.QuantConfig(bits=3, group_size=32, method="rtn"))
    assert row["bits_per_weight"] == made.bits_per_weight
    found = compare(tmp_path / "out", source, text_file, seq_len=32, windows=5)
    assert json.loads(json.dumps(found.to_dict())).items() <= row.items()

    assert run("--methods", "rtn", script.PLAIN, "--seeds", "2") == 0
    assert [(row["method"], row["config"]["seed"]) for row in json.loads(file.read_text())["rows"]] == [
        ("rtn", 0), (script.PLAIN, 0), (script.PLAIN, 1),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    monkeypatch.setattr(script, "measure", None)  # nothing is measured twice
    assert run("--methods", "rtn", script.PLAIN, "--seeds", "2") == 0
    again = capsys.readouterr().out
    assert printed.endswith(again)
    rtn = next(line for line in again.splitlines() if "| rtn |" in line)
    assert f"| {found.gap:+.2%} |" in rtn
    assert f"| {found.kl:.4f} [" in rtn

    assert run("--methods", "rtn", "--dtype", "bfloat16") == 2
    assert "was measured with dtype 'auto', not 'bfloat16'" in capsys.readouterr().err
