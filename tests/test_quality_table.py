"""The table of quality against size: what it measures, that it goes on where it stopped, and how it reads peers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gptq import compare, config, load, quantize
from gptq.checkpoint.assembled import Place, TensorIndex
from gptq.formats.original import open_original
from tests.conftest import MakeModel, load_script

for name in ("peer_environment", "check_llama_cpp", "quality_peers"):  # what the script imports
    load_script(name)
script, peers = load_script("quality_table"), load_script("quality_peers")
WINDOWS = torch.arange(3, 99).view(3, 32)


def test_every_preset_is_a_configuration_and_plain_gptq_pins_what_it_means() -> None:
    for options in script.PRESETS.values():
        config.QuantConfig(**options)
    plain = config.QuantConfig(**script.PRESETS[script.PLAIN])
    levers = plain.search, plain.desc_act, plain.sweeps, plain.two_streams, plain.tune_steps
    assert levers == (False, False, 0, False, 0)


@pytest.mark.slow
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


def test_a_padded_model_computes_the_same(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama", intermediate_size=90)
    padded = script.pad_inner(source, 32, tmp_path / "padded")
    networks = [load(folder) for folder in (source, padded)]
    assert networks[1].model.layers[0].mlp.down_proj.weight.shape[1] == 96
    with torch.no_grad():
        one, other = (network(WINDOWS).logits for network in networks)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sym", [True, False])
def test_a_file_is_read_into_the_weights_and_the_size_that_its_record_has(
    make_model: MakeModel, text_file: str, tmp_path: Path, sym: bool
) -> None:
    source = make_model("llama", dtype=torch.bfloat16)
    asked = config.QuantConfig(bits=3, group_size=32, sym=sym, method="rtn", format="pack-quantized")
    made = quantize(source, tmp_path / "out", asked)
    packed = load(tmp_path / "out", dtype="float32")
    peers._say_float32(tmp_path / "out" / "config.json")
    bits, _ = peers._write_plain(open_original(tmp_path / "out"), source, tmp_path / "plain")
    assert bits == made.bits_per_weight
    plain = load(tmp_path / "plain")
    for name, parameter in plain.named_parameters():
        weight = packed.get_submodule(name.removesuffix(".weight")).weight
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(parameter, weight.float()), name


def test_an_importance_matrix_holds_the_sums_of_squares_of_inputs(make_model: MakeModel, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = make_model("llama")
    network = load(source, dtype="float32")
    linears = {f"{n}.weight": m for n, m in network.named_modules() if isinstance(m, nn.Linear) and "proj" in n}
    index = TensorIndex(files=["x.gguf"], tensors={name: Place(tensor=f"t.{name}") for name in linears})
    peers.write_importance(source, WINDOWS, index, tmp_path / "importance.gguf")
    stored = {t.name: np.array(t.data).ravel() for t in gguf.GGUFReader(tmp_path / "importance.gguf").tensors}
    assert stored.keys() == {f"t.{name}.{part}" for name in linears for part in ("in_sum2", "counts")}
    with torch.no_grad():
        states = network(WINDOWS, output_hidden_states=True).hidden_states
        first = network.model.layers[0].input_layernorm(states[0])  # (windows, tokens, hidden), what q_proj gets
    expected = first.double().square().sum((0, 1)).numpy()
    np.testing.assert_allclose(stored["t.model.layers.0.self_attn.q_proj.weight.in_sum2"], expected, rtol=1e-5)
    assert stored["t.model.layers.1.mlp.down_proj.weight.counts"] == [WINDOWS.numel()]
