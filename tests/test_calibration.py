"""Windows are seeded, whole, without overlap; every kind of source is read; what is missing is said."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gptq import InputError
from gptq.calibration import text as calibration


def test_windows_are_a_seeded_choice_of_distinct_pieces(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = calibration.tokenize([text], tokenizer)
    pieces = {tuple(p.tolist()) for p in whole[: len(whole) // 32 * 32].view(-1, 32)}
    drawn = calibration.draw_windows([text], tokenizer, 20, 32, seed=3)
    assert drawn.shape == (20, 32)
    assert len({tuple(w.tolist()) for w in drawn} & pieces) == 20
    assert torch.equal(drawn, calibration.draw_windows([text], tokenizer, 20, 32, seed=3))
    assert not torch.equal(drawn, calibration.draw_windows([text], tokenizer, 20, 32, seed=4))
    state = torch.get_rng_state()
    calibration.draw_windows([text], tokenizer, 20, 32, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_large_sources_are_drawn_row_by_row_without_reuse(
    text: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"{i} {text[i * 97 : i * 97 + 90]}" for i in range(300)]
    monkeypatch.setattr(calibration, "SMALL_SOURCE", 100)
    drawn = calibration.draw_windows(rows, tokenizer, 15, 64, seed=0)
    assert drawn.shape == (15, 64)
    assert torch.equal(drawn, calibration.draw_windows(rows, tokenizer, 15, 64, seed=0))
    opened = [str(tokenizer.decode(w)).split()[0] for w in drawn]
    assert len(set(opened)) == 15  # each begins at a row of its own
    with pytest.raises(InputError, match=r"tokens, enough for \d+ windows of 64; 5000 windows need 320000"):
        calibration.draw_windows(rows, tokenizer, 5000, 64, seed=0)


def test_too_short_says_how_many_tokens_there_were_and_are_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = len(calibration.tokenize(["a few words"], tokenizer))
    with pytest.raises(InputError, match=f"has {tokens} tokens, enough for 0 windows of 64; 8 windows need 512"):
        calibration.draw_windows(["a few words"], tokenizer, 8, 64, seed=0)
    with pytest.raises(InputError, match=f"has {tokens} tokens; one window needs 64"):
        calibration.evaluation_windows(["a few words"], tokenizer, 64, None)


def test_evaluation_windows_are_the_text_in_order(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [text[:1000], text[1000:2000]]
    tokens = calibration.tokenize(rows, tokenizer)
    cut = calibration.evaluation_windows(rows, tokenizer, 16, None)
    assert torch.equal(cut.flatten(), tokens[: cut.numel()])
    assert len(tokens) - cut.numel() < 16
    assert torch.equal(calibration.evaluation_windows(rows, tokenizer, 16, 3), cut[:3])
    assert tokenizer.decode(tokens) == "\n\n".join(rows)


def test_every_kind_of_source(tmp_path: Path) -> None:
    rows = ["one", "two", ""]
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows))
    with gzip.open(tmp_path / "a.json.gz", "wt") as packed:
        packed.write((tmp_path / "a.jsonl").read_text())
    table = datasets.Dataset.from_dict({"text": rows})
    table.to_parquet(tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.Dataset.from_dict({"text": ["held out"]}).to_parquet(folder / "test-00000-of-00001.parquet")
    assert list(calibration.documents(str(tmp_path / "a.txt"), "train")) == ["one\n\ntwo"]
    assert list(calibration.documents(str(tmp_path / "a.jsonl"), "train")) == rows
    assert list(calibration.documents(str(tmp_path / "a.json.gz"), "train")) == rows
    assert list(calibration.documents(str(tmp_path / "a.parquet"), "test")) == rows
    assert list(calibration.documents(str(folder), "train")) == rows
    assert list(calibration.documents(str(folder), "test")) == ["held out"]
    assert list(calibration.documents(f"{folder}:train", "test")) == rows
    with pytest.raises(InputError, match="has no split 'dev'; name one of"):
        calibration.documents(f"{folder}:dev", "test")


def test_sources_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("text\n1\n")
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "broken.jsonl").write_text('{"content": "x"\n[')
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.csv", "is not a .txt, .jsonl or .parquet"),
        ("a.jsonl", "no column 'text'; its columns are content"),
        ("broken.jsonl", "could not be read"),
        ("numbers.jsonl", "holds int64, not strings"),
        ("empty", "could not be read"),
        ("nowhere.txt", "no such file or folder"),
    ):
        with pytest.raises(InputError, match=message):
            calibration.documents(str(tmp_path / name), "train")

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(calibration, "load_dataset", offline)
    with pytest.raises(InputError, match=r"could it be fetched from the Hub \(no route\). Pass a local .txt"):
        calibration.documents("c4", "train")


def test_c4_is_drawn_from_training_text_and_measured_on_validation_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, data_files: dict[str, str]) -> datasets.DatasetDict:
        return datasets.DatasetDict({part: datasets.Dataset.from_dict({"text": [f]}) for part, f in data_files.items()})

    monkeypatch.setattr(calibration, "load_dataset", load_dataset)
    assert list(calibration.documents("c4", "train")) == ["en/c4-train.00000-of-01024.json.gz"]
    for source in ("c4", "c4:validation"):
        assert list(calibration.documents(source, "test")) == ["en/c4-validation.00000-of-00008.json.gz"]
