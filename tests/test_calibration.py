"""Windows are seeded, whole, without overlap; every kind of source is read; what is missing is said."""

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gptq import InputError, QuantConfig
from gptq.calibration import arrays, chats, sources, windows
from gptq.calibration import text as calibration
from gptq.formats.original import open_original
from gptq.models import build
from tests.conftest import MakeModel


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
    (tmp_path / "a.xml").write_text("text\n1\n")
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "broken.jsonl").write_text('{"content": "x"\n[')
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.xml", "is not a .txt, .jsonl, .json, .csv or .parquet"),
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

    monkeypatch.setattr(sources, "load_from_hub", offline)
    with pytest.raises(InputError, match=r"nor a data set that the Hub could give: no route\. Name a local \.txt"):
        calibration.documents("c4", "train")


def test_c4_is_drawn_from_training_text_and_measured_on_validation_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, data_files: dict[str, str]) -> datasets.DatasetDict:
        return datasets.DatasetDict({part: datasets.Dataset.from_dict({"text": [f]}) for part, f in data_files.items()})

    monkeypatch.setattr(sources, "load_from_hub", load_dataset)
    assert list(calibration.documents("c4", "train")) == ["en/c4-train.00000-of-01024.json.gz"]
    for source in ("c4", "c4:validation"):
        assert list(calibration.documents(source, "test")) == ["en/c4-validation.00000-of-00008.json.gz"]


# --- where a text begins, and long texts ------------------------------------------------------------------------------


def with_beginning(tokenizer: PreTrainedTokenizerFast, template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """A copy of the tokenizer that puts its special token around a text."""
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0)])
    return own


@pytest.mark.parametrize("small", [calibration.SMALL_SOURCE, 100])
def test_every_window_begins_as_a_text_does_whatever_the_size_of_the_source(
    small: int, text: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SMALL_SOURCE", small)
    own = with_beginning(tokenizer, "<s> $A <s>")
    assert calibration.special_ends(own) == ([0], [0])
    assert calibration.special_ends(tokenizer) == ([], [])
    rows = text.split("\n\n")
    windows = calibration.draw_windows(rows, own, 9, 24, seed=1)
    assert windows.shape == (9, 24)
    assert bool((windows[:, 0] == 0).all())
    assert not bool((windows[:, 1:] == 0).any())  # nowhere else
    whole = " ".join(map(str, calibration.tokenize(rows, tokenizer).tolist()))
    rowwise = " ".join(str(t) for row in rows for t in calibration.tokenize([row + "\n\n"], tokenizer).tolist())
    for window in windows:
        assert " ".join(map(str, window[1:].tolist())) in (whole if small > 100 else rowwise)
    assert torch.equal(
        calibration.draw_windows(rows, tokenizer, 9, 23, seed=1), windows[:, 1:]
    )  # but for that token, the windows are those of a tokenizer without one


def metaspace_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer that marks the beginning of words, and of the text, as SentencePiece does."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<s>"], unk_token="<s>")
    unigram.train_from_iterator([text[:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=unigram, bos_token="<s>", unk_token="<s>")


def test_tokenizing_in_pieces_is_tokenizing_whole(
    text: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = text + "naïve façade 🙂🙂 " * 50 + "a" * 300 + text[:5000]
    lengths: list[int] = []
    encode = calibration._encode

    def listening(text: str, *args: Any, **options: Any) -> Any:
        lengths.append(len(text))
        return encode(text, *args, **options)

    for one in (tokenizer, with_beginning(tokenizer), metaspace_tokenizer(text)):
        whole = calibration.tokenize([words], one)
        lengths.clear()
        with monkeypatch.context() as patched:
            patched.setattr(calibration, "PIECE", 2999)
            patched.setattr(calibration, "OVERLAP", 300)
            patched.setattr(calibration, "_encode", listening)
            assert torch.equal(calibration.tokenize([words], one), whole)
        assert max(lengths) <= 2999  # which is what bounds the memory
        assert len(lengths) > len(words) / 2999


def test_a_text_without_a_joint_is_tokenized_whole(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "x" * 5000
    whole = calibration.tokenize([words], tokenizer)
    monkeypatch.setattr(calibration, "PIECE", 1000)
    monkeypatch.setattr(calibration, "OVERLAP", 100)
    monkeypatch.setattr(calibration, "AGREEMENT", 200)
    assert calibration._tokenize_in_pieces(words, tokenizer) is None
    assert torch.equal(calibration.tokenize([words], tokenizer), whole)


# --- masks and shapes -------------------------------------------------------------------------------------------------


def test_padding_on_either_side_and_none_are_the_same_windows() -> None:
    ids, pad = torch.arange(1, 13).view(2, 6), torch.full((2, 3), 99)
    ones, zeros = torch.ones(2, 6), torch.zeros(2, 3)
    none = arrays.as_inputs([{"input_ids": ids}])
    for mask in (torch.cat([ones, zeros], 1), torch.cat([zeros, ones], 1)):
        order = [ids, pad] if bool(mask[0, 0]) else [pad, ids]
        for kind in (torch.int64, torch.bool, torch.float32):
            found = arrays.as_inputs([{"input_ids": torch.cat(order, 1), "attention_mask": mask.to(kind)}])
            assert [[*window] for window in found] == [["input_ids"]] * 2
            assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(none, found, strict=True))
    middle = torch.tensor([[1, 0, 1, 1, 0, 1]])
    positions = torch.arange(18).view(3, 1, 6)
    inside = arrays.as_inputs(
        [{"input_ids": ids[:1], "attention_mask": middle, "position_ids": positions, "pixel_values": torch.ones(1, 6)}]
    )[0]
    assert inside["input_ids"].tolist() == [[1, 3, 4, 6]]
    assert inside["position_ids"].tolist() == positions[..., [0, 2, 3, 5]].tolist()
    assert (inside["attention_mask"].tolist(), inside["pixel_values"].shape) == ([[1, 1, 1, 1]], (1, 6))


def test_a_decoders_mask_is_its_own() -> None:
    window = {
        "input_ids": torch.ones(1, 4), "attention_mask": torch.tensor([[1, 1, 0, 0]]),
        "decoder_input_ids": torch.arange(4)[None], "decoder_attention_mask": torch.tensor([[0, 1, 1, 1]]),
    }  # fmt: skip
    window["input_ids"] = window["input_ids"].long()
    found = arrays.as_inputs([window])[0]
    assert {name: x.tolist() for name, x in found.items()} == {
        "input_ids": [[1, 1]],
        "decoder_input_ids": [[1, 2, 3]],
    }


IDS = torch.ones(1, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 5)}, "attention_mask in .*0 is 5 long, and masks 6 tokens"),
        ({"input_ids": IDS, "attention_mask": torch.zeros(1, 6)}, "attention_mask in calibration input 0 masks every"),
        (
            {"input_ids": IDS.expand(3, 6), "attention_mask": torch.tensor([[1] * 6, [0] * 6, [1] * 6])},
            "attention_mask in calibration input 0, row 1 masks every position",
        ),
        ({"input_values": torch.ones(1, 9), "attention_mask": torch.ones(1, 5)}, "5 long, which no other array"),
        ({"input_ids": IDS[None]}, r"input_ids in calibration input 0 is \(1, 1, 6\)"),
        ({"input_ids": IDS.float()}, r"torch.float32; it is \(windows, tokens\) integers"),
        (
            {"input_ids": torch.ones(2**40, 0, dtype=torch.int64)},
            r"holds no windows: its shape is \(1099511627776, 0\)",
        ),
        ({"input_ids": IDS.expand(2, 6), "pixel_values": torch.ones(16, 4)}, "given one window at a time"),
        ({"pixel_values": torch.ones(16, 4), "grid": torch.tensor([[1, 4, 3]])}, "the same number of windows"),
        ({"input_ids": IDS, "attention_mask": torch.tensor(1)}, r"holds no windows: its shape is \(\)"),
    ],
)
def test_arrays_that_do_not_fit_are_a_sentence(window: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        arrays.as_inputs([window])


def test_windows_have_the_same_inputs() -> None:
    with pytest.raises(
        InputError, match=r"are \['input_ids'\] first and \['input_ids', 'b'\] later, in calibration input 1"
    ):
        arrays.as_inputs([{"input_ids": IDS}, {"input_ids": IDS, "b": IDS}])


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2), (2**33, 0)])
def test_files_of_odd_shapes_are_a_sentence(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.zeros(shape, np.int64))
    with pytest.raises(InputError, match=rf"input_ids in .*a\.npz .*\({shape[0]},"):
        arrays.read_arrays(str(tmp_path / "a.npz"), 4, 0)


def test_what_a_processor_returns_is_one_window() -> None:
    window = {"input_ids": IDS, "pixel_values": torch.ones(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    two = arrays.as_inputs([window, window])
    assert [{name: x.shape for name, x in found.items()} for found in two] == [
        {n: x.shape for n, x in window.items()}
    ] * 2
    del window["input_ids"]
    assert len(arrays.as_inputs([window])) == 1
    lists = arrays.as_inputs(
        [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}, {"input_ids": [4], "attention_mask": [1]}]
    )
    assert [found["input_ids"].tolist() for found in lists] == [[[1, 2, 3]], [[4]]]
    ragged = arrays.as_inputs([{"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]]}])
    assert [found["input_ids"].tolist() for found in ragged] == [[[1, 2, 3]], [[4]]]


# --- chats ------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def pairs(text: str, count: int = 12) -> list[list[str]]:
    words = text.split()
    return [
        [" ".join(words[40 * i : 40 * i + 5 + i]), " ".join(words[40 * i + 20 : 40 * i + 40])] for i in range(count)
    ]


def spoken(asked: str, said: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def in_parts(message: dict[str, str]) -> dict[str, Any]:
    return {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}


ROWS: dict[str, Callable[[str, str], dict[str, Any]]] = {  # one pair in each kind of columns
    "messages": lambda a, b: {"messages": spoken(a, b), "source": "x"},
    "parts": lambda a, b: {"messages": [in_parts(message) for message in spoken(a, b)]},
    "conversations": lambda a, b: {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]},
    "response": lambda a, b: {"prompt": a, "response": b},
    "completion": lambda a, b: {"prompt": spoken(a, b)[:1], "completion": spoken(a, b)[1:]},
    "instruction": lambda a, b: {"instruction": a, "input": "", "output": b},
}


def open_rows(rows: list[dict[str, Any]], file: Path) -> sources.Table:
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return sources.open_table(str(file), "train")


@pytest.mark.parametrize("kind", ROWS)
def test_chats_are_what_the_template_makes_of_them(
    kind: str, text: str, chatty: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expected = {
        tuple(chatty(str(chatty.apply_chat_template(spoken(a, b), tokenize=False)), add_special_tokens=False).input_ids)
        for a, b in pairs(text)
    }
    by_template: Any = chatty.apply_chat_template(spoken(*pairs(text)[0]), tokenize=True, return_dict=True)
    assert tuple(by_template["input_ids"]) in expected
    rows = [ROWS[kind](a, b) for a, b in pairs(text)]
    for table in (
        open_rows(rows, tmp_path / "a.jsonl"),
        open_rows(rows, tmp_path / "a.parquet"),
        sources.table_of(rows, ""),
    ):
        assert table is not None
        found = [tuple(ids.tolist()) for ids in chats.tokenized_chats(table, chatty, seed=3)]
        assert len(found) == len(pairs(text))
        assert {*found} == expected
        assert found == [tuple(ids.tolist()) for ids in chats.tokenized_chats(table, chatty, seed=3)]


def test_a_chat_of_no_tokens_is_left_out(text: str, chatty: PreTrainedTokenizerFast) -> None:
    chatty.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": said}]} for said in ("one", "", "three")]
    table = sources.table_of(rows, "")
    assert table is not None
    assert sorted(map(len, chats.tokenized_chats(table, chatty, seed=0)))[0] > 0
    assert len(list(chats.tokenized_chats(table, chatty, seed=0))) == 2
    with pytest.raises(InputError, match="has 2 chats of"):
        chats.draw_chats(table, chatty, 3, 8, 0, packed=False)


def test_windows_of_chats_are_packed_or_their_own(text: str, chatty: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    table = open_rows([ROWS["messages"](a, b) for a, b in pairs(text)], tmp_path / "a.jsonl")
    whole = [*chats.tokenized_chats(table, chatty, 0)]
    alone = chats.draw_chats(table, chatty, 9, 64, seed=0, packed=False)
    assert all(torch.equal(window, ids[:64]) for window, ids in zip(alone, whole, strict=False))
    assert len({len(window) for window in alone}) > 1 or len(alone[0]) == 64
    packed = chats.draw_chats(table, chatty, 4, 150, seed=0, packed=True)
    rest = whole
    for window in packed:  # each window is whole chats one after another, cut at its end
        count = next(n for n in range(1, 99) if sum(map(len, rest[:n])) >= 150)
        assert torch.equal(window, torch.cat(rest[:count])[:150])
        rest = rest[count:]
    with pytest.raises(
        InputError, match=r"a.jsonl has 12 chats of \d+ tokens, enough for \d+ windows of 150; give more"
    ):
        chats.draw_chats(table, chatty, 99, 150, seed=0, packed=True)
    with pytest.raises(InputError, match=r"a.jsonl has 12 chats of \d+ tokens, one a window, for 99 windows"):
        chats.draw_chats(table, chatty, 99, 150, seed=0, packed=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, "a.jsonl, row 0: the chat has no message of a user"),
        ({"messages": []}, "row 0: a chat is a list of messages, and this is"),
        ({"messages": "hello"}, "row 0: a chat is a list of messages, and this is 'hello'"),
        ({"messages": [{"text": "a"}]}, "row 0: message 0 is .* without a role and a content"),
        (
            {"messages": [*spoken("a", "b"), {"role": "tool", "content": "c"}]},
            "row 0: the chat template fails: no tools",
        ),
        ({"conversations": [{"from": "gpt", "value": "c"}]}, "row 0: the chat has no message of a user"),
        ({"prompt": None, "response": "a"}, "row 0: message 0 is .*None.* without a role and a content"),
    ],
)
def test_a_chat_that_is_none_is_named_by_its_row(
    row: dict[str, Any], message: str, chatty: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    table = open_rows([row], tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=message):
        list(chats.tokenized_chats(table, chatty, 0))


def test_chats_need_a_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    table = open_rows([{"messages": spoken("a", "b")}], tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="holds chats, and the model's tokenizer has no chat template"):
        list(chats.tokenized_chats(table, tokenizer, 0))


# --- what calibration may be ------------------------------------------------------------------------------------------


def test_every_kind_of_text_gives_the_same_windows(
    make_model: MakeModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = text.split("\n\n")
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_dict({"text": rows}).to_csv("a.csv")
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    given: list[Any] = [
        "a.csv", Path("a.jsonl"), rows, tuple(rows), datasets.Dataset.from_dict({"text": rows}),
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": rows})}), [{"text": row} for row in rows],
    ]  # fmt: skip
    folder, config = make_model("llama"), QuantConfig(num_samples=8, seq_len=32)
    network = build.open_model(open_original(folder), False).network
    drawn = []
    for one in given:
        opened = windows.read_calibration(one, config, folder)
        drawn.append(windows.make_windows(opened, 8, folder, network, config, False)[0])
    for other in drawn[1:]:
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(drawn[0], other, strict=True))


def test_what_is_no_calibration_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n")
    (tmp_path / "other.jsonl").write_text('{"content": "x", "id": 1}\n')
    cases: list[tuple[Any, str]] = [
        (tmp_path / "none.jsonl", "none.jsonl is empty"),
        (tmp_path / "blank.jsonl", "blank.jsonl is empty"),
        (
            tmp_path / "other.jsonl",
            "other.jsonl has no column 'text'; its columns are content, id. Text is in .*messages",
        ),
        ("nowhere.csv", "nowhere.csv: no such file or folder"),
        ([], "not one calibration input"),
        ([3, 4], "dicts of arrays"),
        ({"input_ids": IDS}, "one dict is no list"),
        (datasets.Dataset.from_dict({"a": ["b"]}), "the given data set has no column 'text'; its columns are a"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            windows.read_calibration(given, QuantConfig(), tmp_path)


# --- found by reading -------------------------------------------------------------------------------------------------


def test_a_folder_of_texts_is_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text("one line\n\nand another", encoding="utf-8")
    (folder / "b.txt").write_text("the second\nbook", encoding="utf-8-sig")
    texts = ["one line\n\nand another", "the second\nbook"]
    assert [*calibration.documents(str(folder), "train")] == texts
    (folder / "meta.json").write_text("{}", encoding="utf-8")
    assert [*calibration.documents(str(folder), "train")] == texts
    parts = "- split: train\n    path: a.txt\n  - split: test\n    path: b.txt"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n  {parts}\n---\n")
    assert [*calibration.documents(str(folder), "test")] == texts[1:]


def test_a_licence_beside_tables_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("all rights", encoding="utf-8")
    (tmp_path / "train.tsv").write_text("text\tb\nwords\t1\n", encoding="utf-8")
    (tmp_path / "more.tsv").write_text("text\tb\nother\t1\n", encoding="utf-8")
    assert "all rights" not in [*calibration.documents(str(tmp_path), "train")]


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert calibration.documents(str(tmp_path / "a.txt"), "train") == ["words"]


def test_a_column_called_like_the_beginning_of_an_archive(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("PK,text\n1,words\n", encoding="utf-8")
    assert calibration.documents(str(tmp_path / "a.csv"), "train") == ["words"]
    (tmp_path / "b.csv").write_bytes(b"PK\x03\x04\x14\x00")
    with pytest.raises(InputError, match=r"begins with b'PK.* which is no csv"):
        calibration.documents(str(tmp_path / "b.csv"), "train")


def test_tables_in_memory_are_their_rows() -> None:
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    streamed = datasets.IterableDatasetDict({"train": rows.to_iterable_dataset()})
    frame: Any = rows.to_pandas()
    for given in (rows, rows.with_format("arrow"), datasets.DatasetDict({"train": rows}), streamed, frame):
        table = sources.table_of(given, "train")
        assert table is not None
        assert [table.row(i)["text"] for i in range(len(table.rows))] == ["one", "two"]
    assert sources.table_of({"input_ids": torch.zeros(1, 4)}, "train") is None
