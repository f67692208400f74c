"""The whole journey on tiny random models of each architecture, checked against plain transformers and the oracle."""

import gc
import hashlib
import json
import resource
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import greenlet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from transformers.pytorch_utils import Conv1D

from gptq import InputError, QuantConfig, load, perplexity, quantize, solver
from gptq.checkpoint.tensors import sha256
from gptq.checkpoint.writer import ShardWriter
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from gptq.output.results import RECORD
from gptq.pipeline import quantize as quantize_module
from gptq.pipeline import search
from gptq.pipeline.run import Observer
from gptq.solver import IntegerGrid
from gptq.solver.coordinate_descent import refine
from tests import oracle
from tests.conftest import ARCHITECTURES, WIDTH, MakeModel

CONFIG = QuantConfig(bits=4, group_size=32, num_samples=6, seq_len=32, format="gptq")
BLOCK_LINEARS = {
    "llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "opt": 6, "gpt2": 4, "gemma2": 7, "gemma3_text": 7, "phi3": 4,
    "bloom": 4, "gpt_neox": 4, "falcon": 4,
}  # fmt: skip


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def dequantize_into(network: PreTrainedModel, out: Path, bits: int) -> PreTrainedModel:
    """The original model with its linear weights replaced by what the oracle reads from the packed file."""
    file = load_file(out / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in file if key.endswith(".qweight")]:
        linear = network.get_submodule(name)
        W = oracle.dequantized(file, name, bits).float()
        linear.weight.data = W.T.contiguous() if isinstance(linear, Conv1D) else W
    return network


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_from_file_to_file(
    kind: str, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, out = make_model(kind), tmp_path / "out"
    result = quantize(source, out, CONFIG, calibration=windows, device="cpu")
    assert len(result.layers) == 2 * BLOCK_LINEARS[kind]
    for layer in result.layers:
        assert layer.error < layer.rtn_error, layer.name
        assert layer.tokens == windows.numel()
    assert verify.verify(out).problems == []

    stored, original = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    packed = {key.rpartition(".")[0] for key in stored if key.endswith(".qweight")}
    for name, tensor in original.items():  # every source tensor is packed, or there bit for bit
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(stored.pop(name), tensor), name
    assert {key.rpartition(".")[2] for key in stored} == {"qweight", "qzeros", "scales", "g_idx"}

    ids = windows[:2]
    with torch.no_grad():
        ours = load(out, device="cpu")(input_ids=ids).logits
        theirs = dequantize_into(AutoModelForCausalLM.from_pretrained(source), out, 4)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_what_a_file_holds_is_what_the_solver_chose_and_the_forward_used(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    quantize(make_model(), tmp_path / "out", CONFIG, calibration=windows)
    record = json.loads((tmp_path / "out" / "quantization_record.json").read_text())
    file = load_file(tmp_path / "out" / "model.safetensors")
    for layer in record["layers"]:
        read = oracle.dequantized(file, layer["stored"], 4)
        assert torch.equal(read.float().double(), read)
        assert sha256(read.float()) == layer["weight_sha256"]
        for dtype in ("float32", "bfloat16", "float16"):  # of activations; packed tensors stay as they are
            linear = load(tmp_path / "out", dtype=dtype).get_submodule(layer["name"])
            assert isinstance(linear, QuantLinear)
            assert sha256(linear.weight) == layer["weight_sha256"]


def test_what_is_written_for_readers(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source = make_model("llama")
    for name, options, sym, desc_act in (
        ("sym", {}, True, False),
        ("asym", {"sym": False, "desc_act": True}, False, False),
        ("scattered", {"desc_act": True, "static_groups": False}, True, True),
    ):
        out = tmp_path / name
        quantize(source, out, QuantConfig(**{**CONFIG.to_dict(), **options}), calibration=windows)
        written = json.loads((out / "quantize_config.json").read_text())
        expected = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 32, "lm_head": False}
        assert {**written, **expected, "sym": sym, "desc_act": desc_act} == written
        config = json.loads((out / "config.json").read_text())
        assert config.pop("quantization_config") == written
        assert config == json.loads((source / "config.json").read_text())
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_failed_run_lets_go_of_its_forwards(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source = make_model("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="infinity"):
        quantize(source, tmp_path / "out", CONFIG, calibration=windows)
    gc.collect()
    assert not [g for g in gc.get_objects() if type(g) is greenlet and g and not g.dead and g.parent]


def test_missing_tensors_are_found_before_the_work_and_when_measuring(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, text_file: str
) -> None:
    source = make_model("llama")
    original = load_file(source / "model.safetensors")
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        save_file({k: t for k, t in original.items() if k != name}, source / "model.safetensors")
        with pytest.raises(InputError, match=f"lacks {name}"):
            quantize(source, tmp_path / "out", QuantConfig(method="rtn"))
        with pytest.raises(InputError, match=f"lacks {name}"):
            perplexity(source, text_file, seq_len=32)
    whole_numbers = {**original, "model.layers.0.mlp.up_proj.weight": torch.ones(96, 64, dtype=torch.int32)}
    save_file(whole_numbers, source / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj\.weight in .* holds packed integers, but no quantization_config"):
        quantize(source, tmp_path / "out", CONFIG, calibration=windows)
    save_file({**original, "mtp.weight": torch.ones(3)}, source / "model.safetensors")
    result = quantize(source, tmp_path / "out", CONFIG, calibration=windows)
    assert "mtp.weight: not in the model that config.json describes; copied" in result.notes
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["mtp.weight"], torch.ones(3))
    with pytest.raises(InputError, match=r"tokens run from \d+ to 9999"):
        quantize(
            source, tmp_path / "new", CONFIG, calibration=windows.clamp(min=1).index_fill(0, torch.tensor([2]), 9999)
        )


def test_a_layer_that_no_token_reaches_stays_and_is_said(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.up_proj(x))))
    result = quantize(make_model("llama"), tmp_path / "out", CONFIG, calibration=windows)
    assert not [layer.name for layer in result.layers if layer.tokens == 0 or "gate_proj" in layer.name]
    assert any("gate_proj in 2 layers (model.layers.0.mlp.gate_proj ...) stay as they are" in n for n in result.notes)
    assert verify.verify(tmp_path / "out").problems == []


PLAIN = {"search": False, "desc_act": False, "sweeps": 0, "two_streams": False}


@pytest.mark.parametrize("options", [PLAIN, {**PLAIN, "desc_act": True, "static_groups": False, "sym": False}, {}])
def test_codes_are_those_of_separate_forwards_through_the_quantized_prefix(
    options: dict[str, Any], make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    """True sequential order the slow way: after each layer, plain transformers runs from the start for the next."""
    source = make_model("llama")
    config = QuantConfig(**{**CONFIG.to_dict(), **options})
    quantize(source, tmp_path / "out", config, calibration=windows)
    file = load_file(tmp_path / "out" / "model.safetensors")
    network, untouched = (AutoModelForCausalLM.from_pretrained(source) for _ in range(2))
    order = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    added_to = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    for i, kind in ((i, kind) for i in range(2) for kind in order):
        name = f"model.layers.{i}.{kind}"
        linear = network.get_submodule(name)
        X, original = (inputs_of(name, one, windows) for one in (network, untouched))
        H = (X.T @ X / len(X)).float()
        factor = solver.factorize(H, (solver.act_order if config.desc_act else solver.natural_order)(H), 0.01)
        target = W = linear.state_dict()["weight"]
        if config.two_streams:  # six windows are too few to hold one out, so half of the drift is made up for
            drift = (original - X) @ W.double().T  # (tokens, outputs)
            if kind in added_to:  # and so does what the outputs are added to
                base = f"model.layers.{i}.{added_to[kind]}"
                drift += inputs_of(base, untouched, windows) - inputs_of(base, network, windows)
            correction = drift.T @ X / len(X) @ torch.linalg.inv(oracle.damped(H.double(), 0.01))
            target = (W + 0.5 * correction).float()
        solved = solver.solve(target, factor, IntegerGrid(4, config.sym), 32, config.static_groups, bool(config.search))
        solved = refine(target, solved, factor, IntegerGrid(4, config.sym), config.sweeps or 0)
        read = oracle.dequantized(file, name, 4).float()
        assert (solved.weight() == read).float().mean() > 0.995, name
        linear.weight.data = read


def inputs_of(name: str, network: nn.Module, windows: Tensor) -> Tensor:
    """What a module gets from all windows, (tokens, inputs) float64."""
    seen: list[Tensor] = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for window in windows:
            network(input_ids=window[None])
    hook.remove()
    return torch.cat(seen).flatten(0, 1).double()


def test_held_out_windows_are_measured_and_not_learned_from(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    """Of ten windows the eighth is held out: another one in its place changes no byte of what comes before the drift
    is weighed, and the record tells the error on it."""
    source = make_model("llama")
    ten = torch.cat([windows, windows.flip(0)[:4]])
    other = ten.clone()
    other[7] = ten[7] % 300 + 7  # other tokens: the first layers do not see their order
    single = {**CONFIG.to_dict(), "two_streams": False}
    for name, calibration in (("one", ten), ("two", other)):
        quantize(source, tmp_path / name, QuantConfig(**single), calibration=calibration)
    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "two")
    records = [json.loads((tmp_path / n / "quantization_record.json").read_text()) for n in ("one", "two")]
    for one, two in zip(*(record["layers"] for record in records), strict=True):
        assert one["error"] == two["error"]
        assert one["heldout_error"] != two["heldout_error"]
        assert one["tokens"] == 10 * windows.shape[1]
        assert 0 < one["heldout_error"] < 5 * one["rtn_error"]
    quantize(source, tmp_path / "three", CONFIG, calibration=ten)
    shares = [layer["share"] for layer in json.loads((tmp_path / "three" / RECORD).read_text())["layers"]]
    assert shares[:3] == [0, 0, 0]  # before the first quantized layer nothing has drifted
    assert all(0 <= share <= 1 for share in shares)
    assert any(share > 0 for share in shares)


def weight_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_same_bytes_again_and_for_any_batch_size(
    batch_size: int | None, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source = make_model("mistral")
    for name, size in (("one", None), ("two", batch_size)):
        quantize(source, tmp_path / name, CONFIG, calibration=windows, batch_size=size)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


def test_each_block_runs_once_per_window(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: Counter[int] = Counter()
    plain = LlamaDecoderLayer.forward

    def counted(self: LlamaDecoderLayer, *args: Any, **kwargs: Any) -> Any:
        runs[self.self_attn.layer_idx] += bool(args[0].any())  # a trial without weights gives zeros
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    quantize(make_model("llama", num_hidden_layers=3), tmp_path / "out", CONFIG, calibration=windows)
    assert runs == {0: 12, 1: 12, 2: 12}  # six windows, once as the original and once as the quantized model
    runs.clear()
    quantize(make_model("llama"), tmp_path / "fast", QuantConfig(effort="fast", seq_len=32), calibration=windows)
    assert runs == {0: 6, 1: 6}


def test_layers_on_one_input_share_one_hessian(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = solver.factorize

    def counted(H: Tensor, *args: Any) -> solver.Factor:
        sizes.append(len(H))
        return plain(H, *args)

    monkeypatch.setattr(solver, "factorize", counted)
    quantize(make_model("llama"), tmp_path / "out", CONFIG, calibration=windows)
    assert sizes == [WIDTH, WIDTH, WIDTH, 96] * 2  # q/k/v, o, gate/up, down


@pytest.mark.parametrize(("static_groups", "desc_act"), [(True, True), (False, True), (False, False)])
def test_g_idx_is_trivial_unless_groups_follow_the_activations(
    static_groups: bool, desc_act: bool, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = QuantConfig(bits=4, group_size=32, desc_act=desc_act, static_groups=static_groups)
    quantize(make_model("llama"), out, config, calibration=windows)
    scattered = desc_act and not static_groups
    assert json.loads((out / "quantize_config.json").read_text())["desc_act"] is scattered
    content = verify.inspect(out)
    assert all(layer.ordered_groups is not scattered for layer in content.layers)
    assert {layer.group_size for layer in content.layers} == {32}
    assert verify.verify(out).problems == []


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 48, -1])
def test_sizes_are_the_formats_arithmetic(
    bits: int, sym: bool, group_size: int, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    config = QuantConfig(bits=bits, sym=sym, group_size=group_size, format="gptq")
    result = quantize(source, out, config, calibration=windows)
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "g": (96, 64), "u": (96, 64), "d": (64, 96)}
    stored = 0
    for rows, columns in shapes.values():
        groups = 1 if group_size == -1 else -(-columns // group_size)
        stored += -(-columns * bits // 32) * 4 * rows + groups * (2 * rows + 4 * -(-rows * bits // 32)) + 4 * columns
    assert result.bits_per_weight == pytest.approx(8 * stored / sum(r * c for r, c in shapes.values()))
    assert result.bytes_after == (out / "model.safetensors").stat().st_size
    content = verify.inspect(out)
    assert content.quantized_bytes == 2 * stored
    assert any("a last one of" in note for note in result.notes) == (group_size == 48)


def test_rtn_needs_no_calibration_and_is_the_nearest_code(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model("gpt2"), tmp_path / "out"
    result = quantize(source, out, QuantConfig(method="rtn", bits=3, group_size=16))
    file, original = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    for layer in result.layers:
        W = original[f"{layer.name}.weight"].T
        nearest = solver.round_to_nearest(W, IntegerGrid(3, sym=True), 16)
        assert torch.equal(oracle.dequantized(file, layer.name, 3).float(), nearest.weight())
        assert layer.error == pytest.approx(float((W - nearest.weight()).square().sum() / W.square().sum()), rel=1e-5)


def test_sharded_in_and_sharded_out(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = make_model("qwen2"), make_model("qwen2", max_shard_size="60KB")
    assert len(list(pieces.glob("*.safetensors"))) > 2
    quantize(whole, tmp_path / "a", CONFIG, calibration=windows)
    monkeypatch.setattr(quantize_module, "ShardWriter", partial(ShardWriter, max_shard_bytes=40_000))
    quantize(pieces, tmp_path / "b", CONFIG, calibration=windows)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2
    one, many = load_file(tmp_path / "a" / "model.safetensors"), {k: t for f in files for k, t in load_file(f).items()}
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert verify.verify(tmp_path / "b").problems == []
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a")(windows).logits, load(tmp_path / "b")(windows).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_and_names_without_the_models_prefix(
    tied: bool, make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    """GPT-2's own checkpoint on the Hub says `h.0.attn...` where the model says `transformer.h.0.attn...`."""
    source = make_model("gpt2", tie_word_embeddings=tied)
    file = source / "model.safetensors"
    save_file({k.removeprefix("transformer."): t for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    quantize(source, tmp_path / "out", CONFIG, calibration=windows)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "h.0.attn.c_attn.qweight" in names
    assert ("lm_head.weight" in names) is not tied
    network = load(tmp_path / "out")
    assert (network.get_input_embeddings().weight is network.get_output_embeddings().weight) is tied
    quantize(make_model("gpt2", tie_word_embeddings=tied), tmp_path / "plain", CONFIG, calibration=windows)
    with torch.no_grad():
        assert torch.equal(network(windows).logits, load(tmp_path / "plain")(windows).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(dtype: torch.dtype, make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source = make_model("llama", dtype=dtype)
    for compute in ("float32", "bfloat16"):
        out = tmp_path / compute
        result = quantize(source, out, CONFIG, calibration=windows, dtype=compute)
        assert all(layer.error < layer.rtn_error for layer in result.layers)
        assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == dtype
        network = load(out, dtype=compute)
        assert network.dtype == getattr(torch, compute)
        with torch.no_grad():
            assert network(windows).logits.isfinite().all()


def test_load_generates_and_keeps_weights_packed(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "out", CONFIG, calibration=windows)
    network = load(tmp_path / "out")
    assert {key for key in network.state_dict() if "down_proj" in key} == {
        f"model.layers.{i}.mlp.down_proj.{s}" for i in range(2) for s in ("qweight", "qzeros", "scales", "g_idx")
    }
    made = network.generate(windows[:1, :5], max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert made.shape[1] <= 9
    with torch.no_grad():
        assert int(made[0, 5]) == int(network(windows[:1, :5]).logits[0, -1].argmax())


def leaves_nothing(out: Path) -> bool:
    return not out.exists() and not out.with_name(out.name + ".partial").exists()


def test_broken_numbers_name_their_tensor_or_layer(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} in .* holds NaN"):
        quantize(source, tmp_path / "nan", CONFIG, calibration=windows)
    assert not (tmp_path / "nan").exists()
    tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: a scale of .* does not fit float16"):
        quantize(source, tmp_path / "scale", CONFIG, calibration=windows)
    tensors[name] = torch.full_like(tensors[name], 0.1)
    tensors["model.layers.1.input_layernorm.weight"] *= 1e38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"input of model\.layers\.1\.self_attn\.q_proj holds NaN or infinity"):
        quantize(source, out, CONFIG, calibration=windows)
    assert not out.exists()


def test_what_cannot_be_quantized_is_refused_before_the_work(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, text_file: str
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    quantize(source, out, CONFIG, calibration=windows)
    with pytest.raises(InputError, match="not empty"):
        quantize(source, out, CONFIG, calibration=windows)
    config = json.loads((source / "config.json").read_text())
    for change, message in (
        ({"model_type": "not-a-model"}, "config.json could not be used: .*not-a-model"),
        ({"intermediate_size": 128}, r"has the shape \(.*, but config.json describes a model where it is"),
        ({"num_hidden_layers": 5}, "checkpoint lacks model.layers.2.self_attn.q_proj.weight"),
        ({"num_hidden_layers": 0}, "no list of repeated blocks"),
    ):
        (source / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            quantize(source, tmp_path / "new", CONFIG, calibration=windows)
    (source / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        quantize(source, tmp_path / "new", CONFIG, calibration=windows)
    (source / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        quantize(source, tmp_path / "new", CONFIG, calibration=windows)
    assert leaves_nothing(tmp_path / "new")


def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    make_model: MakeModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def fills_up(self: ShardWriter, name: str, tensor: Tensor) -> None:
        written.append(name)
        if len(written) == 20:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", fills_up)
    with pytest.raises(InputError, match=r"No space left on device\); free some of it; nothing is left there"):
        quantize(make_model("llama"), tmp_path / "out", CONFIG, calibration=windows)
    assert leaves_nothing(tmp_path / "out")


def test_a_real_limit_on_file_size_is_a_sentence_too(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source, before = make_model("llama"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"File too large\); nothing is left there"):
            quantize(source, tmp_path / "out", CONFIG, calibration=windows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert leaves_nothing(tmp_path / "out")


def test_verify_names_every_kind_of_change(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama"), out, CONFIG, calibration=windows)
    shard, config = out / "model.safetensors", out / "config.json"
    whole, settings = shard.read_bytes(), config.read_text()
    tensors = load_file(shard)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        changed = {k: t.clone() for k, t in tensors.items()}
        key = f"model.layers.1.mlp.up_proj.{name}"
        changed[key].view(torch.uint8).view(-1)[0] ^= 1
        save_file(changed, shard, metadata={"format": "pt"})
        problems = verify.verify(out).problems
        assert f"the tensor {key} was changed after it was written" in problems
        assert any(p.startswith("model.layers.1.mlp.up_proj ") for p in problems)
    del changed["model.norm.weight"]
    changed["model.extra"] = torch.zeros(1)
    save_file(changed, shard, metadata={"format": "pt"})
    assert {"the tensor model.norm.weight is missing", "the tensor model.extra was added"} < set(
        verify.verify(out).problems
    )
    shard.write_bytes(whole)
    config.write_text(settings.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert verify.verify(out).problems == ["config.json was changed after it was written"]
    config.write_text(settings)
    (out / "tokenizer.json").unlink()
    assert verify.verify(out).problems == ["tokenizer.json is missing"]
    (out / "quantization_record.json").unlink()
    found = verify.verify(out)
    assert not found.recorded
    assert (found.problems, found.notes) == ([], [verify.NO_RECORD])
    (out / "README.md").unlink()
    for name in ("config.json", "quantize_config.json"):
        (out / name).write_text((out / name).read_text().replace('"gptq:', '"other:'))
    assert verify.verify(out).notes == []  # now it is like any other tool's file


def test_misshapen_packed_tensors_are_named(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama"), out, CONFIG, calibration=windows)
    tensors = load_file(out / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    for change, message in (
        (
            {f"{layer}.qweight": torch.zeros(3, 64, dtype=torch.int32)},
            rf"{layer}.qweight .* shape \(3, 64\), not \(12, 64\)",
        ),
        (
            {f"{layer}.g_idx": torch.full((96,), 7, dtype=torch.int32)},
            rf"{layer}.g_idx .* runs from 7 to 7, but there are 3",
        ),
        ({f"{layer}.scales": None}, f"{layer} .* has g_idx, qweight, qzeros; .* needs g_idx, qweight, qzeros, scales"),
        ({"model.norm.weight": None}, "lacks model.norm.weight"),
        ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight has the shape \(3,\)"),
        ({k.replace("layers.0", "layers.9"): t.clone() for k, t in tensors.items() if layer in k}, "no layer"),
    ):
        changed = {k: t for k, t in {**tensors, **change}.items() if t is not None}
        save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            load(out)


def test_bytes_do_not_depend_on_the_global_generator(make_model: MakeModel, text_file: str, tmp_path: Path) -> None:
    source = make_model("qwen3")
    digests = []
    for state in (1, 2):
        torch.manual_seed(state)
        quantize(source, tmp_path / str(state), CONFIG, calibration=text_file)
        digests.append(hashlib.sha256((tmp_path / str(state) / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    quantize(source, tmp_path / "3", QuantConfig(**{**CONFIG.to_dict(), "seed": 5}), calibration=text_file)
    other = hashlib.sha256((tmp_path / "3" / "model.safetensors").read_bytes()).hexdigest()
    assert other != digests[0]


@pytest.mark.slow
def test_samples_auto_stops_when_more_would_not_help(
    make_model: MakeModel, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doubling ends at the first number whose held-out error is within reach of the calibration error, or with the
    text; the run that follows is the run with that number given."""
    source = make_model("llama")
    auto: dict[str, Any] = {"group_size": 32, "seq_len": 16, "effort": "fast", "num_samples": "auto"}
    tried: list[str] = []

    class Listener(Observer):
        def stage(self, text: str) -> None:
            tried.append(text)

    monkeypatch.setattr(search, "MAX_WINDOWS", 64)
    monkeypatch.setattr(search, "MAX_EXCESS", -1.0)  # never enough
    made = quantize(source, tmp_path / "most", QuantConfig(**auto), calibration=text_file, observer=Listener())
    assert [text.split()[0] for text in tried if "held-out error" in text] == ["16", "32", "64"]
    assert any("more samples would help" in note for note in made.notes)
    given = QuantConfig(**{**auto, "num_samples": 64})
    quantize(source, tmp_path / "given", given, calibration=text_file)
    assert weight_bytes(tmp_path / "most") == weight_bytes(tmp_path / "given")
    tried.clear()
    monkeypatch.setattr(search, "MAX_EXCESS", 1e9)
    made = quantize(source, tmp_path / "few", QuantConfig(**auto), calibration=text_file, observer=Listener())
    assert [text.split()[0] for text in tried if "held-out error" in text] == ["16"]
    assert any("more samples would change little" in note for note in made.notes)
