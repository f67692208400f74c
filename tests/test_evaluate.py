"""Perplexity against a cross-entropy written out by hand."""

import math
from pathlib import Path

import pytest
import torch

from gptq import InputError, evaluate, load, perplexity
from gptq.blocks import read_tokenizer
from tests.conftest import MakeModel


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
        evaluate.perplexity_of(network, torch.ones(1, 8, dtype=torch.int64))
