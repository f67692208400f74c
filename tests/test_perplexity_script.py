"""The papers' perplexity protocols on a text made by hand, whose tokens can be counted."""

import json
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gptq import InputError, load, perplexity
from tests.conftest import MakeModel, load_script

script = load_script("perplexity")
NUMBERS = [str(n) for n in range(100)]


@pytest.fixture(scope="module")
def spelling() -> PreTrainedTokenizerFast:
    """Each number is its own token plus 2, each character of white space is 1, and 0 stands at the start of a text."""
    vocabulary = {"<s>": 0, "<space>": 1, **{n: int(n) + 2 for n in NUMBERS}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<space>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Split("\n", "isolated")]
    )
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


def windows(name: str, rows: list[str], tokenizer: PreTrainedTokenizerFast, seq_len: int) -> list[list[int]]:
    found: list[list[int]] = script.protocol_windows(script.PROTOCOLS[name], rows, tokenizer, seq_len).tolist()
    return found


def test_wikitext2_joins_by_blank_lines_begins_once_and_drops_the_tail(spelling: PreTrainedTokenizerFast) -> None:
    rows = ["", "7\n", "", "8 9\n"]
    assert windows("wikitext2", rows, spelling, 5) == [[0, 1, 1, 9, 1], [1, 1, 1, 1, 10]]  # "\n\n7\n\n\n\n\n8 9\n"


def test_ptb_joins_by_blank_lines_and_ptb_new_by_spaces(spelling: PreTrainedTokenizerFast) -> None:
    assert windows("ptb", ["7", "8"], spelling, 5) == [[0, 9, 1, 1, 10]]
    assert windows("ptb-new", ["7", "8", "9", "7"], spelling, 4) == [[0, 9, 1, 10], [1, 11, 1, 9]]


def test_c4_new_takes_its_first_1100_documents_and_256_windows(spelling: PreTrainedTokenizerFast) -> None:
    found = torch.tensor(windows("c4-new", ["5"] * 1100 + ["6"] * 900, spelling, 2))
    assert found.shape == (256, 2)
    everything = windows("c4-new", ["5"] * 1100 + ["6"] * 900, spelling, 20)
    assert len(everything) == (1 + 1100 + 1099) // 20
    assert not any(8 in window for window in everything)


def test_c4_draws_documents_and_places_from_pythons_seed_0(spelling: PreTrainedTokenizerFast) -> None:
    rows = ["1 2", " ".join(NUMBERS), " ".join(reversed(NUMBERS)), "3"]
    tokens = [spelling(row)["input_ids"] for row in rows]
    random.seed(0)  # the protocol's own words: a document until one is long enough, then a place in it
    expected: list[list[int]] = []
    while len(expected) < 256:
        row = tokens[random.randint(0, 3)]
        if len(row) >= 16:
            start = random.randint(0, len(row) - 16 - 1)
            expected.append(row[start : start + 16])
    assert windows("c4", rows, spelling, 16) == expected
    with pytest.raises(InputError, match="none of the 2 documents has the 16 tokens"):
        windows("c4", ["1", "2"], spelling, 16)


def test_a_plain_text_file_gives_the_rows_of_the_hubs_data_set(tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text(" \n = Title = \n \n A line.\u2028 Goes on. \n", encoding="utf-8")
    wikitext2, ptb, c4 = (script.PROTOCOLS[name] for name in ("wikitext2", "ptb", "c4"))
    assert script.read_rows(wikitext2, str(file)) == ["", " = Title = \n", "", " A line.\u2028 Goes on. \n"]
    sentences = tmp_path / "ptb.test.txt"
    sentences.write_text(" no it was n't \n but \n")
    assert script.read_rows(ptb, str(sentences)) == ["no it was n't", "but"]
    Dataset.from_dict({"sentence": ["no", "but"]}).to_parquet(tmp_path / "ptb.parquet")
    assert list(script.read_rows(ptb, str(tmp_path / "ptb.parquet"))) == ["no", "but"]
    with pytest.raises(InputError, match="C4 is measured on its documents"):
        script.read_rows(c4, str(sentences))


@pytest.mark.slow
def test_the_script_agrees_with_the_package(
    make_model: MakeModel,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, file = make_model("llama"), tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in text[:3000].splitlines()))
    monkeypatch.setattr("sys.argv", ["perplexity.py", str(source), "--source", str(file), "--json"])
    assert script.main() == 0
    printed = capsys.readouterr()
    assert "windows are 64 tokens, the model's limit" in printed.err
    assert json.loads(printed.out) == {"protocol": "wikitext2", **perplexity(source, str(file)).to_dict()}
    tokens = script.protocol_windows(
        script.PROTOCOLS["wikitext2"], text[:3000].splitlines(), script.read_tokenizer(source, False), 64
    )
    with torch.no_grad():  # as the reference computes it: the mean of the windows' mean losses
        losses = [load(source)(input_ids=w[None], labels=w[None]).loss for w in tokens]
    assert json.loads(printed.out)["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    monkeypatch.setattr("sys.argv", ["perplexity.py", str(source), "--source", str(tmp_path / "none.txt")])
    assert script.main() == 2
    assert "no such file" in capsys.readouterr().err
