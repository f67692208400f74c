"""Perplexity, KL divergence and agreement against what is written out by hand."""

import math
from pathlib import Path

import pytest
import torch
import transformers

from gptq import InputError, compare, load, perplexity
from gptq.evaluation import evaluate, original_logits, quality
from gptq.models.hf_config import read_tokenizer
from tests.conftest import MIXED, OTHERS, VOCAB, MakeModel


def test_perplexity_is_the_exponential_of_the_mean_surprise_of_each_next_token(
    make_model: MakeModel, text_file: str
) -> None:
    source = make_model("qwen2")
    tokens = read_tokenizer(source, False)(Path(text_file).read_text())["input_ids"][: 3 * 16]
    network = load(source)
    surprise = []
    for window in torch.tensor(tokens).view(3, 16):
        with torch.no_grad():
            probabilities = network(input_ids=window[None]).logits[0].double().softmax(-1)  # (16, vocabulary)
        surprise += [-math.log(float(probabilities[i, window[i + 1]])) for i in range(15)]
    found = perplexity(source, text_file, seq_len=16, windows=3)
    assert (found.tokens, found.windows, found.seq_len) == (45, 3, 16)
    assert found.perplexity == pytest.approx(math.exp(sum(surprise) / 45), rel=1e-5)


def test_output_that_is_not_a_number_is_refused(make_model: MakeModel) -> None:
    network = load(make_model("qwen2"))
    network.get_submodule("model.norm").weight.data.fill_(float("nan"))  # type: ignore[operator]
    with pytest.raises(InputError, match="holds NaN or infinity"):
        evaluate.measure_perplexity(network, torch.ones(1, 8, dtype=torch.int64))


def test_differences_are_those_of_a_float64_softmax_written_out() -> None:
    reference = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -math.inf]])
    logits = torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.0, 0.0]])
    targets = torch.tensor([2, 0])
    losses, kl = [0.0, 0.0], 0.0
    for p_row, q_row, target in zip(reference.tolist(), logits.tolist(), targets.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, p_row)) for x in p_row]
        q = [math.exp(x) / sum(map(math.exp, q_row)) for x in q_row]
        losses = [losses[0] - math.log(q[target]) / 2, losses[1] - math.log(p[target]) / 2]
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a) / 2
    expected = [*losses, kl, 0.5]  # the most likely token differs in the first row only
    assert evaluate.compare_logits(reference, logits, targets).tolist() == pytest.approx(expected, rel=1e-14)


def test_differences_do_not_depend_on_the_chunk(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, logits = torch.randn(2, 50, 7, generator=rng)
    targets = torch.randint(7, (50,), generator=rng)
    whole = evaluate.compare_logits(reference, logits, targets)
    monkeypatch.setattr(evaluate, "CHUNK_LOGITS", 21)
    assert torch.allclose(evaluate.compare_logits(reference, logits, targets), whole, rtol=1e-14)


def test_intervals_are_reproducible_cover_the_mean_and_shrink_to_nothing() -> None:
    numbers = torch.rand(400, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = evaluate.summarize(numbers, 16)
    assert found == evaluate.summarize(numbers, 16)
    assert found.intervals is not None
    low, high = found.intervals["kl"]  # of a mean: 1.96 standard errors on each side
    half = 1.96 * float(numbers[:, 2].std()) / 20
    assert [low, high] == pytest.approx([found.kl - half, found.kl + half], abs=half / 10)
    assert found.gap == pytest.approx(found.perplexity / found.original_perplexity - 1)
    # Pairing: a loss that is the original's plus a constant has a gap without any spread.
    numbers[:, 0] = numbers[:, 1] + 0.1
    paired = evaluate.summarize(numbers, 16).intervals
    assert paired is not None
    assert paired["gap"] == pytest.approx((math.expm1(0.1),) * 2)
    assert paired["perplexity"][1] - paired["perplexity"][0] > 0.01
    assert evaluate.summarize(numbers[:1], 16).intervals is None


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_a_model_against_itself(
    kind: str, make_model: MakeModel, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original, whole or streamed block by block, predicts what the model does."""
    source = make_model(kind)
    steps: list[tuple[int, int]] = []
    whole = compare(source, source, text_file, seq_len=16, windows=5, progress=lambda *step: steps.append(step))
    assert (steps[0], steps[-1]) == ((1, 5), (5, 5))
    assert (whole.gap, whole.kl, whole.top1_agreement) == (0, 0, 1)
    steps.clear()
    monkeypatch.setattr(original_logits, "MOST_OF_MEMORY", 0)
    found = compare(source, source, text_file, seq_len=16, windows=5, progress=lambda *step: steps.append(step))
    assert (steps[0], steps[-1]) == ((1, 20), (20, 20))  # two models of two blocks
    assert steps == sorted(steps)
    assert [found.kl, found.gap, found.top1_agreement] == pytest.approx([0, 0, 1], abs=1e-10)
    alone = perplexity(source, text_file, seq_len=16, windows=5)
    assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
    assert (found.tokens, found.windows, found.seq_len) == (alone.tokens, alone.windows, alone.seq_len)


def test_a_model_that_runs_blocks_again_is_measured_whole_or_refused_with_the_memory_that_it_takes(
    make_model: MakeModel, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(transformers, "HrmTextConfig"):
        pytest.skip("this release of transformers has no model for text that runs blocks again")
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    monkeypatch.setitem(MIXED, "hrm_text", {**small, "head_dim": 16, "vocab_size": VOCAB, "prefix_lm": False})
    source = make_model("hrm_text")
    found = compare(source, source, text_file, seq_len=16, windows=1, dtype="float32")
    assert found.kl == 0
    monkeypatch.setattr(original_logits, "MOST_OF_MEMORY", 1e-9)
    with pytest.raises(
        InputError, match=r"runs \d+ times in a forward, .* whole in float32, it needs [\d,.]+ MB of free"
    ):
        compare(source, source, text_file, seq_len=16, windows=1, dtype="float32")


def test_a_comparison_with_something_else_is_refused(make_model: MakeModel, text_file: str, tmp_path: Path) -> None:
    source = make_model("llama")
    larger = make_model("llama", vocab_size=400)
    with pytest.raises(InputError, match=r"320 logits, .* has 400"):
        compare(source, larger, text_file, seq_len=16, windows=1)
    tokenizer = larger / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace('"merges"', '"ignored_merges"', 1))
    merges = '"merges": [],"ignored_merges"'
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace('"ignored_merges"', merges, 1))
    with pytest.raises(InputError, match="different tokens"):
        compare(source, larger, text_file, seq_len=16, windows=1)


def test_measurements_are_kept_beside_the_model_once_each(tmp_path: Path) -> None:
    first = quality.Measurement(data="a.txt", original=None, seq_len=16, windows=2, perplexity=3.0)
    quality.add_measurement(tmp_path, first)
    quality.add_measurement(tmp_path, first.model_copy(update={"data": "b.txt"}))
    quality.add_measurement(tmp_path, first.model_copy(update={"perplexity": 4.0}))
    assert [(m.data, m.perplexity) for m in quality.read_measurements(tmp_path)] == [("b.txt", 3.0), ("a.txt", 4.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["quality.json"]
    (tmp_path / "quality.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        quality.read_measurements(tmp_path)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_models_that_see_what_follows_are_not_measured(
    is_decoder: bool, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OTHERS, "bert", ("BertLMHeadModel", OTHERS["bert"][1]))
    network = load(make_model("bert", is_decoder=is_decoder))
    tokens = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    if is_decoder:
        assert evaluate.measure_perplexity(network, tokens).perplexity > 1
        return
    with pytest.raises(InputError, match="BertLMHeadModel predicts tokens from those that follow"):
        evaluate.measure_perplexity(network, tokens)


def test_a_model_that_divides_its_weights_is_itself_block_by_block(
    make_model: MakeModel, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("rwkv", num_hidden_layers=4, rescale_every=2)
    monkeypatch.setattr(original_logits, "_fits_into_memory", lambda *_: False)
    assert compare(source, source, text_file, seq_len=16, windows=3).kl < 1e-6


def test_a_perplexity_that_no_record_holds_is_a_sentence(make_model: MakeModel) -> None:
    network = load(make_model("qwen2"))
    network.get_submodule("model.norm").weight.data.mul_(1e4)  # type: ignore[operator]
    with pytest.raises(InputError, match="has a loss of 69 nats per token or more"):
        evaluate.measure_perplexity(network, torch.arange(1, 17).view(2, 8))
