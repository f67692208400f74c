"""Checkpoints whose files hold tensors under an engine's names are presented as what they were made of."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gptq import InputError
from gptq.checkpoint.assembled import INDEX_FILE, interleave, open_source, split_halves
from gptq.checkpoint.tensors import TensorInfo

STORED = {
    "stack": torch.arange(24, dtype=torch.uint8).view(2, 4, 3),
    "norm": torch.tensor([1.5, 0.25, -3.0]),
    "wide": torch.arange(32, dtype=torch.float32).view(8, 4),
}
PLACES: dict[str, Any] = {
    "experts.0.w": {"tensor": "stack", "entry": 0},
    "experts.1.w": {"tensor": "stack", "entry": 1, "heads": 2},
    "norm": {"tensor": "norm", "added": 1.0, "dtype": "BF16"},
    "q": {"tensor": "wide", "heads": 2},
    "gate": {"tensor": "stack", "entry": 0, "alternate": 0},
    "up": {"tensor": "wide", "alternate": 1},
}


def write(folder: Path, places: dict[str, Any], files: list[str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(STORED, folder / "model.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"files": files or ["model.safetensors"], "tensors": places}))
    return folder


def test_interleaving_puts_the_halves_of_each_head_side_by_side() -> None:
    rows = torch.arange(12).view(12, 1)
    assert interleave(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(split_halves(interleave(rows, 3), 3), rows)


def test_a_tensor_is_read_as_the_checkpoint_had_it(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "model", PLACES))
    assert source.tensors["experts.0.w"] == TensorInfo(torch.uint8, (4, 3))
    assert torch.equal(source.read("experts.0.w"), STORED["stack"][0])
    assert torch.equal(interleave(source.read("experts.1.w"), 2), STORED["stack"][1])
    assert torch.equal(source.read("norm"), torch.tensor([0.5, -0.75, -4.0], dtype=torch.bfloat16))
    assert source.read("norm", torch.float32).dtype == torch.float32
    assert torch.equal(interleave(source.read("q"), 2), STORED["wide"])
    assert source.tensors["gate"] == TensorInfo(torch.uint8, (2, 3))
    assert torch.equal(source.read("gate"), STORED["stack"][0, 0::2])
    assert torch.equal(source.read("up"), STORED["wide"][1::2])
    assert source.file_bytes == (tmp_path / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"tensor": "none"}, "which the file does not hold so"),
        ({"tensor": "stack", "dtype": "F32"}, "which the file does not hold so"),
        ({"tensor": "stack", "entry": 2}, "is said to be entry 2"),
        ({"tensor": "norm", "entry": 0}, "is said to be entry 0"),
        ({"tensor": "stack", "entry": -1}, "damaged"),
        ({"tensor": "wide", "heads": 3}, "3 heads"),
        ({"tensor": "wide", "heads": 8}, "8 heads"),
        ({"tensor": "wide", "heads": 0}, "damaged"),
        ({"tensor": "norm", "alternate": 0}, "every other row"),
        ({"tensor": "wide", "alternate": 2}, "damaged"),
        ({"tensor": "norm", "added": 1.0}, "no dtype"),
        ({"tensor": "norm", "dtype": "I32"}, "damaged"),
        ({"tensor": 5}, "damaged"),
        (5, "damaged"),
    ],
    ids=str,
)
def test_an_index_that_does_not_fit_its_file_is_refused(place: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_source(write(tmp_path / "model", {**PLACES, "x": place}))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "absent.safetensors", ".", ""])
def test_an_index_names_files_beside_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        open_source(write(tmp_path / "model", PLACES, [name]))
