"""Activations rounded to int8 at run time: files that compressed-tensors reads, and an error that eval measures."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gptq import InputError, QuantConfig, convert, load, quantize
from gptq.inference import hf_registration
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from tests.conftest import VOCAB, MakeModel

W8A8 = {"method": "rtn", "bits": 8, "group_size": -1, "format": "int-quantized"}
W4A8 = {"method": "rtn", "bits": 4, "group_size": 32, "format": "pack-quantized-a8"}
IDS = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [W8A8, W4A8])
def test_compressed_tensors_in_transformers_reads_the_rounding_too(
    options: dict[str, Any], make_model: MakeModel, tmp_path: Path, rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """compressed-tensors' scale is max |x| / 127.5, and 127.5 becomes 127; vLLM's and ours is max |x| / 127."""
    out = tmp_path / "out"
    tables: Any = sys.modules[hf_registration.TABLES]
    method = "compressed-tensors"
    monkeypatch.setitem(tables.AUTO_QUANTIZATION_CONFIG_MAPPING, method, transformers.CompressedTensorsConfig)
    monkeypatch.setitem(tables.AUTO_QUANTIZER_MAPPING, method, tables.AUTO_QUANTIZER_MAPPING[method].theirs)
    quantize(make_model("llama"), out, QuantConfig.from_dict(options))
    theirs, ours = AutoModelForCausalLM.from_pretrained(out), load(out)
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QuantLinear)}
    assert len(layers) == 14
    with torch.no_grad():
        logits = theirs(IDS).logits  # the first forward unpacks the weights
        for name, layer in layers.items():
            x = torch.randn(2, 5, layer.in_features, generator=rng)
            scale = x.abs().amax(-1, keepdim=True) / 127.5
            rounded = torch.round(x / scale).clamp(-128, 127) * scale
            found = theirs.get_submodule(name)(x)
            torch.testing.assert_close(found, rounded @ layer.weight.T, rtol=0, atol=1e-4)
            error = (found - x @ layer.weight.T).abs().mean()
            assert (layer(x) - x @ layer.weight.T).abs().mean() < 2 * error
        assert (ours(IDS).logits - logits).abs().mean() < 0.1 * ours(IDS).logits.abs().mean()


def test_the_same_integers_with_and_without_rounded_activations(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "a", QuantConfig.from_dict(W8A8))
    convert(tmp_path / "a", tmp_path / "b", "pack-quantized")
    convert(tmp_path / "b", tmp_path / "c", "int-quantized")
    files = [load_file(tmp_path / name / "model.safetensors") for name in "ac"]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert {tensor.dtype for name, tensor in files[0].items() if name.endswith("proj.weight")} == {torch.int8}
    assert verify.verify(tmp_path / "c").problems == []
    with torch.no_grad():
        exact, rounded = (load(tmp_path / name)(IDS).logits for name in "ba")
    assert 0 < float((exact - rounded).abs().mean()) < 0.1 * float(exact.abs().mean())


@pytest.mark.parametrize("change", [{"bits": 4}, {"group_size": 32}, {"sym": False}])
def test_int_quantized_refuses_what_it_cannot_hold(
    change: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--bits 8 --group-size -1 gives"):
        quantize(make_model("llama"), tmp_path / "out", QuantConfig.from_dict({**W8A8, **change}))


@pytest.mark.parametrize("options", [W8A8, W4A8])
def test_rounded_activations_pass_gradients_on(options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "out", QuantConfig.from_dict(options))
    layer: Any = load(tmp_path / "out", dtype="float32").get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = layer(x)
    assert torch.allclose(y, layer(x.detach()), atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, layer.weight.sum(0).expand(3, 64), atol=1e-5)
