"""Polishing: gradients of scales, the distance from the original's predictions, and what a run leaves on disk."""

import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gptq import InputError, PolishConfig, QuantConfig, compare, formats, load, polish, quantize
from gptq.checkpoint.assembled import open_source
from gptq.inference.quant_linear import QuantLinear, round_to_int8
from gptq.models.build import open_model
from gptq.models.weights import WeightStream
from gptq.output import verify
from gptq.pipeline.run import Observer
from gptq.pipeline.tune import substituted
from gptq.polishing import descent
from gptq.polishing.activations import bounded_activations
from gptq.polishing.descent import STATE
from gptq.polishing.polish import BEGUN
from gptq.polishing.scaled_linear import ScaledLinear
from gptq.polishing.teacher import LOWEST, Teacher, record_teacher
from gptq.polishing.token_rows import find_token_rows
from tests.conftest import VOCAB, MakeModel

OPTIONS = PolishConfig(steps=20, num_samples=16, seq_len=32)


@pytest.fixture
def tokens(rng: torch.Generator) -> Tensor:
    return torch.randint(1, VOCAB, (24, 32), generator=rng)


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- the teacher ------------------------------------------------------------------------------------------------------


def test_with_all_tokens_kept_the_divergence_is_that_of_the_whole_distributions(
    tmp_path: Path, rng: torch.Generator
) -> None:
    p, q = (3 * torch.randn(2, 7, 50, generator=rng, dtype=torch.float64) for _ in range(2))
    teacher = record_teacher(tmp_path, iter(p), 2, 7, Observer())
    for window in range(2):
        log_p, log_q = p[window].log_softmax(1), q[window].log_softmax(1)
        expected = (log_p.exp() * (log_p - log_q)).sum(1).mean()
        assert float(teacher.divergence(window, q[window].float())) == pytest.approx(float(expected), rel=2e-3)
    again = record_teacher(tmp_path, iter(()), 2, 7, Observer())  # from the files
    assert (again.tokens == teacher.tokens).all()
    assert (again.log_probabilities == teacher.log_probabilities).all()


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["teacher.values", "teacher.tokens", "teacher.done"])
def test_predictions_that_were_changed_on_disk_are_computed_again(
    name: str, tmp_path: Path, rng: torch.Generator
) -> None:
    logits, observer = torch.randn(2, 7, 50, generator=rng), Notes()
    teacher = record_teacher(tmp_path, iter(logits), 2, 7, observer)
    expected = teacher.tokens.tobytes(), teacher.log_probabilities.tobytes()
    for byte in range(0, (tmp_path / name).stat().st_size, 97):
        flip(tmp_path / name, byte)
        again = record_teacher(tmp_path, iter(logits), 2, 7, observer)
        assert (again.tokens.tobytes(), again.log_probabilities.tobytes()) == expected
        assert again.vocabulary == 50
        assert "is damaged, and is computed again" in observer.notes.pop()
        assert observer.notes == []


def test_merging_tokens_is_a_lower_bound_with_the_gradient_of_what_was_merged(
    tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq.polishing.teacher.KEPT", 8)
    p, q = (3 * torch.randn(1, 5, 40, generator=rng, dtype=torch.float64) for _ in range(2))
    teacher = record_teacher(tmp_path, iter(p), 1, 5, Observer())
    logits = q[0].float().requires_grad_()
    found = teacher.divergence(0, logits)
    found.backward()

    exact = q[0].clone().requires_grad_()
    P, Q = p[0].softmax(1), exact.softmax(1)
    kept = P.topk(8, dim=1).indices
    merged = [torch.cat([x.gather(1, kept), (x.sum(1) - x.gather(1, kept).sum(1))[:, None]], 1) for x in (P, Q)]
    expected = (merged[0] * (merged[0].log() - merged[1].log())).sum(1).mean()
    expected.backward()
    whole = (P * (P.log() - Q.log())).sum(1).mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=2e-3)
    assert float(expected.detach()) < float(whole.detach())
    assert logits.grad is not None
    assert exact.grad is not None
    assert torch.allclose(logits.grad.double(), exact.grad, atol=2e-4)


def test_a_token_that_the_original_rules_out_does_not_make_the_divergence_infinite(tmp_path: Path) -> None:
    logits = torch.zeros(1, 3, 6)
    logits[:, :, 2] = -torch.inf
    teacher: Teacher = record_teacher(tmp_path, iter(logits), 1, 3, Observer())
    assert float(teacher.log_probabilities.min()) >= LOWEST
    assert float(teacher.divergence(0, logits[0].clamp(min=-30))) == pytest.approx(0, abs=1e-3)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4}, {"bits": 2, "sym": False}, {"bits": 3, "format": "pack-quantized"}, {"bits": 4, "format": "mlx"},
        {"bits": 3, "format": "mlx", "sym": False},
        {"bits": 4, "static_groups": False, "desc_act": True, "method": "gptq"},
        {"format": "int-quantized", "bits": 8, "group_size": -1},
        {"bits": 4, "format": "pack-quantized-a8", "group_size": 32}, {"bits": 4, "format": "nvfp4-pack-quantized"},
    ],
    ids=lambda options: str(options.get("format", "gptq")),
)  # fmt: skip
def test_gradients_of_scales_and_offsets_are_those_of_the_dense_formula(
    options: dict[str, Any], make_model: MakeModel, tmp_path: Path, windows: Tensor, rng: torch.Generator
) -> None:
    """By autograd in float64 through s (1 + c) u + o + s d, with u from the stored weight; then what is rounded."""
    config = QuantConfig.from_dict({"method": "rtn", "group_size": 32, **options} | {"seq_len": 32})
    if config.format == "nvfp4-pack-quantized":
        config = QuantConfig(method="rtn", format="nvfp4-pack-quantized")
    quantize(make_model("llama"), tmp_path / "out", config, calibration=windows)
    network = load(tmp_path / "out", dtype="float32")
    packed = network.get_submodule("model.layers.0.mlp.gate_proj")
    assert isinstance(packed, QuantLinear)
    tunes = formats.FORMATS[packed.scheme.format].grid(packed.scheme).tunes_scales
    layer = ScaledLinear(packed)
    x = torch.randn(5, packed.in_features, generator=rng)
    assert torch.allclose(layer(x), packed(x), atol=1e-4)
    assert torch.equal(layer.weight, packed.weight)
    if not tunes:
        return
    codes = layer.codes()
    W, groups = codes.weight().double(), codes.g_idx.long()
    offset = torch.zeros_like(W) if codes.offset is None else codes.offset.double()[:, groups]
    change = (0.1 * torch.randn(codes.scale.shape, generator=rng, dtype=torch.float64)).requires_grad_()
    target = torch.randn(5, packed.out_features, generator=rng, dtype=torch.float64)
    rounded = (round_to_int8(x) if packed.rounds_activations else x).double()
    shift = (0.1 * torch.randn(codes.scale.shape, generator=rng, dtype=torch.float64)).requires_grad_()
    dense = (W - offset) * (1 + change)[:, groups] + offset
    if codes.offset is not None:
        dense = dense + (codes.scale.double() * shift)[:, groups]
    (rounded @ dense.T - target).square().sum().backward()
    assert (layer.shift is None) == (codes.offset is None)
    variables = [(layer.change, change), *([] if layer.shift is None else [(layer.shift, shift)])]
    with torch.no_grad():
        for variable, value in variables:
            variable.copy_(value)
    (layer(x).double() - target).square().sum().backward()
    for variable, value in variables:
        assert value.grad is not None
        assert variable.grad is not None
        assert torch.allclose(variable.grad.double(), value.grad, rtol=1e-3, atol=1e-3 * float(value.grad.abs().max()))
    made = layer.round()
    assert made is not None
    assert torch.equal(made.codes, codes.codes)
    dense = dense.detach()
    assert torch.allclose(made.weight().double(), dense, atol=0.02 * float(dense.abs().max()))
    assert torch.allclose(layer.weight, made.weight(), atol=1e-5)


def test_a_forward_keeps_no_codes_for_its_backward(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    packed = load(tmp_path / "out", dtype="float32").get_submodule("model.layers.0.mlp.gate_proj")
    assert isinstance(packed, QuantLinear)
    W = ScaledLinear(packed).weight
    assert W.grad_fn is not None
    kept = W.grad_fn.codes  # type: ignore[attr-defined]
    assert kept.codes.untyped_storage().nbytes() == 0


def test_a_scale_of_zero_stays_one(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model("llama"), tmp_path / "out", QuantConfig(method="rtn", group_size=32, format="mlx", sym=False))
    packed = load(tmp_path / "out", dtype="float32").get_submodule("model.layers.0.mlp.gate_proj")
    assert isinstance(packed, QuantLinear)
    packed._buffers["scales"][0, 0] = 0  # type: ignore[index]
    layer = ScaledLinear(packed)
    assert layer.shift is not None
    with torch.no_grad():
        layer.change.add_(0.1)
        layer.shift.add_(0.1)
    rounded = layer.round()
    assert rounded is not None
    assert rounded.scale[0, 0] == 0
    assert bool(torch.isfinite(layer.change).all() & torch.isfinite(layer.shift).all())
    assert torch.allclose(layer.weight, rounded.weight().float(), atol=1e-6)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(make_model: MakeModel, tmp_path: Path, tokens: Tensor) -> tuple[Path, Path]:
    """An original, and the same at 2 bits rounded to nearest."""
    source = make_model("llama")
    quantize(source, tmp_path / "q", QuantConfig(method="rtn", bits=2, group_size=32, format="gptq"))
    return source, tmp_path / "q"


@pytest.mark.slow
def test_every_window_has_its_turn_before_any_has_another() -> None:
    learned = [0, 1, 2, 3, 5, 8, 13]
    steps = [descent.windows_of_step(learned, number, seed=4) for number in range(30)]
    assert all(len(step) == descent.STEP_WINDOWS for step in steps)
    turns = [tuple(chain(*steps[start : start + 3])) for start in range(0, 30, 3)]
    assert all(len(set(turn)) == 6 for turn in turns)
    assert len(set(turns)) == 10  # orders differ, and so does the window that is left over
    assert set(chain(*turns)) == set(learned)
    assert steps[:3] != [descent.windows_of_step(learned, number, seed=5) for number in range(3)]


def test_it_predicts_more_like_the_original_with_the_same_codes(packed: tuple[Path, Path], tokens: Tensor) -> None:
    source, folder = packed
    out = folder.with_name("out")
    made = polish(folder, source, out, OPTIONS, calibration=tokens)
    assert made.kl_after < made.kl_before
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name, x in before.items() if not torch.equal(x, after[name])}
    assert changed == {"scales", "weight"}  # weights of norms and embeddings
    assert all(before[name].dtype == x.dtype for name, x in after.items())
    assert verify.verify(out).problems == []
    again = polish(folder, source, folder.with_name("again"), OPTIONS, calibration=tokens)
    assert (folder.with_name("again") / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert again.kl_after == made.kl_after


@pytest.mark.parametrize(
    "options",
    [{"format": "mlx"}, {"format": "mlx", "sym": False}, {"format": "pack-quantized"}, {"format": "gptq"}],
    ids=str,
)
def test_scales_of_a_bfloat16_model_are_rounded_to_what_the_file_holds(
    options: dict[str, Any], make_model: MakeModel, tokens: Tensor, tmp_path: Path
) -> None:
    """MLX keeps the model's dtype for scales and offsets, others have float16; the file's checksums tell."""
    source = make_model("llama", dtype=torch.bfloat16)
    config = QuantConfig.from_dict({"method": "rtn", "bits": 2, "group_size": 32, **options})
    quantize(source, tmp_path / "q", config)
    given = PolishConfig(steps=2, num_samples=8, seq_len=32)
    made = polish(tmp_path / "q", source, tmp_path / "out", given, calibration=tokens, dtype="float32")
    assert made.kl_after < made.kl_before
    assert verify.verify(tmp_path / "out").problems == []


@pytest.mark.slow
def test_steps_that_lead_nowhere_are_not_taken_for_perfect(
    packed: tuple[Path, Path], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rate so large that all becomes NaN."""
    source, out = packed
    monkeypatch.setattr(descent, "RATE", 1e30)
    monkeypatch.setattr(descent, "CHECK_EVERY", 5)
    polished = polish(out, source, out.parent / "polished", OPTIONS, calibration=tokens, dtype="float32")
    assert polished.kl_after == polished.kl_before > 0
    assert any("stays as it was" in note for note in polished.notes)


def test_predictions_that_are_not_finite_are_refused(packed: tuple[Path, Path], tokens: Tensor) -> None:
    source, out = packed
    file = out / "model.safetensors"
    content = load_file(file)
    content["model.norm.weight"][:] = torch.finfo(content["model.norm.weight"].dtype).max
    save_file(content, file, {"format": "pt"})
    with pytest.raises(InputError, match="predicts NaN or infinity on the calibration windows"):
        polish(out, source, out.parent / "polished", OPTIONS, calibration=tokens, dtype="float32")


@pytest.mark.slow
def test_any_seed_of_a_quantization_is_one_of_polishing(packed: tuple[Path, Path], tokens: Tensor) -> None:
    source, out = packed
    config = replace(OPTIONS, seed=2**63 - 1, steps=2)
    assert polish(out, source, out.parent / "polished", config, calibration=tokens, dtype="float32").kl_before > 0


@pytest.mark.parametrize("tied", [True, False])
def test_only_rows_of_tokens_in_the_text_change(
    tied: bool, make_model: MakeModel, tokens: Tensor, tmp_path: Path
) -> None:
    """Whatever the forward computes in: bfloat16 here, which would round the float32 of the file."""
    source = make_model("llama", tie_word_embeddings=tied)
    quantize(source, tmp_path / "q", QuantConfig(method="rtn", bits=2, group_size=32))
    given = PolishConfig(steps=2, num_samples=8, seq_len=32)
    text = tokens % 50 + 7  # of 50 tokens
    polish(tmp_path / "q", source, tmp_path / "out", given, calibration=text, dtype="bfloat16")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "out"))
    names = ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
    assert ("lm_head.weight" in before) == (not tied)
    for name in names:
        rows = set((before[name] != after[name]).any(1).nonzero()[:, 0].tolist())
        assert rows
        assert rows <= set(text.unique().tolist())
    assert verify.verify(tmp_path / "out").problems == []


def test_gradients_of_rows_are_those_of_the_dense_matrix(make_model: MakeModel, rng: torch.Generator) -> None:
    """A matrix that is the embedding and the head, by autograd in float64."""
    source = str(make_model("llama", tie_word_embeddings=True))
    network = AutoModelForCausalLM.from_pretrained(source)
    opened = open_model(open_source(Path(source)), False)
    weights = WeightStream(opened.source, opened.names, torch.device("cpu"), torch.float32)
    tokens = torch.tensor([3, 4, 9])
    (rows,) = find_token_rows(network, weights, tokens)
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    E = embedding.weight.detach().double()  # (vocabulary, features)
    change = torch.randn(3, E.shape[1], generator=rng, dtype=torch.float64, requires_grad=True)
    dense = E.index_add(0, tokens, E.square().mean().sqrt() * change)
    ids, target = torch.tensor([3, 9, 9, 5]), torch.randn(4, len(E), generator=rng, dtype=torch.float64)
    ((dense[ids].tanh() @ dense.T - target).square().mean()).backward()
    with torch.no_grad():
        rows.change.copy_(change)
    own = rows.parameters()
    assert {module for module, _ in own} == {embedding, head}
    with substituted(own):
        (head(embedding(ids).tanh()) - target.float()).square().mean().backward()
    assert change.grad is not None
    assert rows.change.grad is not None
    assert torch.allclose(rows.change.grad.double(), change.grad, rtol=1e-4, atol=1e-6)


class Stop(Observer):
    """Ends a run after a number of steps, as a kill would."""

    def __init__(self, after: int) -> None:
        self._after = after

    def step_done(self, done: int, total: int) -> None:
        if done == self._after:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bytes(
    packed: tuple[Path, Path], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "CHECK_EVERY", 4)
    source, folder = packed
    whole, out = folder.with_name("whole"), folder.with_name("out")
    polish(folder, source, whole, OPTIONS, calibration=tokens)
    for after in (2, 9):
        with pytest.raises(KeyboardInterrupt):
            polish(folder, source, out, OPTIONS, calibration=tokens, observer=Stop(after))
    assert not out.exists()
    with pytest.raises(InputError, match="was begun with options"):
        polish(folder, source, out, PolishConfig(steps=21, num_samples=16, seq_len=32), calibration=tokens)
    polish(folder, source, out, OPTIONS, calibration=tokens)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    assert not out.with_name("out.partial").exists()


@pytest.mark.slow
def test_what_a_stopped_run_left_is_checked_before_it_is_used(
    packed: tuple[Path, Path], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed byte in any file of OUT.partial, or one gone: the result is an undisturbed run's, or there is none."""
    monkeypatch.setattr(descent, "CHECK_EVERY", 2)
    source, folder = packed
    whole, out = folder.with_name("whole"), folder.with_name("out")
    partial, kept, options = out.with_name("out.partial"), folder.with_name("kept"), replace(OPTIONS, steps=4)
    polish(folder, source, whole, options, calibration=tokens)
    with pytest.raises(KeyboardInterrupt):
        polish(folder, source, out, options, calibration=tokens, observer=Stop(3))
    partial.rename(kept)
    for name, byte, said in (
        (STATE, -9, "all steps are taken again"),
        (BEGUN, None, ""),
        (BEGUN, 5, "remove it"),
    ):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(kept, partial)
        if byte is None:
            (partial / name).unlink()
        else:
            flip(partial / name, byte)
        observer = Notes()
        if said == "remove it":
            with pytest.raises(InputError, match=said):
                polish(folder, source, out, options, calibration=tokens)
            return
        polish(folder, source, out, options, calibration=tokens, observer=observer)
        assert said in " ".join(observer.notes)
        assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
        shutil.rmtree(out)


class Sweeps(Observer):
    """Removes the working folder when a step is done."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def step_done(self, done: int, total: int) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


def test_a_working_folder_that_is_gone_is_told_as_that(packed: tuple[Path, Path], tokens: Tensor) -> None:
    source, folder = packed
    out = folder.with_name("out")
    with pytest.raises(InputError, match=r"out\.partial"):
        polish(folder, source, out, OPTIONS, calibration=tokens, observer=Sweeps(out.with_name("out.partial")))


class Changes(Observer):
    """Changes a file when the original is about to be read."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def stage(self, text: str) -> None:
        self._file.write_text(self._file.read_text() + " ")


@pytest.mark.parametrize("which", [0, 1])
def test_neither_model_may_change_meanwhile(which: int, packed: tuple[Path, Path], tokens: Tensor) -> None:
    source, folder = packed
    file, steps = packed[which] / "config.json", PolishConfig(steps=1, num_samples=16, seq_len=32)
    with pytest.raises(InputError, match=rf"{file} was changed"):
        polish(folder, source, folder.with_name("out"), steps, calibration=tokens, observer=Changes(file))
    assert not folder.with_name("out").exists()


def test_what_cannot_be_polished_is_refused(make_model: MakeModel, packed: tuple[Path, Path], tokens: Tensor) -> None:
    source, folder = packed
    out = folder.with_name("out")
    with pytest.raises(InputError, match="not a quantized checkpoint"):
        polish(source, source, out, OPTIONS, calibration=tokens)
    with pytest.raises(InputError, match="7 windows leave none"):
        polish(folder, source, out, OPTIONS, calibration=tokens[:7])
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


@pytest.mark.slow
def test_what_is_measured_afterwards_is_better_on_text_that_was_not_seen(
    make_model: MakeModel, tmp_path: Path, text: str
) -> None:
    (tmp_path / "a.txt").write_text(text[:40_000])
    (tmp_path / "b.txt").write_text(text[40_000:])
    source = make_model("llama")
    quantize(source, tmp_path / "q", QuantConfig(method="rtn", bits=2, group_size=32))
    options = PolishConfig(steps=20, num_samples=32, seq_len=32)
    polish(tmp_path / "q", source, tmp_path / "out", options, calibration=str(tmp_path / "a.txt"))
    found = [compare(tmp_path / f, source, str(tmp_path / "b.txt"), seq_len=32, windows=32).kl for f in ("q", "out")]
    assert found[1] < found[0]


class Counted(nn.Module):
    """A block that counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(16, 16), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + torch.tanh(self.linear(x))


@pytest.mark.parametrize(("most", "again"), [(0, 3), (9216, 2), (9217, 1), (2**20, 0)])
def test_blocks_whose_activations_do_not_fit_are_run_again_for_the_same_gradients(
    most: int, again: int, rng: torch.Generator
) -> None:
    """Of 64 tokens a block keeps x and tanh, of 4,096 bytes each, and a weight of 1,024."""
    blocks = [Counted() for _ in range(3)]
    x = torch.randn(64, 16, generator=rng, requires_grad=True)
    variables = [x, *(p for block in blocks for p in block.parameters())]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(nn.Sequential(*blocks)(x).square().sum(), variables)

    expected = gradients()
    with bounded_activations(blocks, most):
        for _ in range(2):  # what is kept of the first pass does not count in the second
            for block in blocks:
                block.runs = 0
            assert all(map(torch.equal, gradients(), expected))
            assert [block.runs for block in blocks] == [1] * (3 - again) + [2] * again
    assert not any("forward" in vars(block) for block in blocks)
