"""The float LeNet, its data and its file."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from gptq.errors import InputError
from lenet_baseline import data, model, train
from lenet_baseline.activations import record_activations
from lenet_baseline.model import BIASED, LAYERS, Bias, LeNet
from tests.conftest import DATA


def random_model(rng: torch.Generator, bias: Bias = "all") -> LeNet:
    made = LeNet(bias)
    made.initialize(rng)
    return made.requires_grad_(False)


# --- model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "count"), [("none", 61770), ("fc3", 61780), ("all", 62006)])
def test_parameters_are_those_of_the_tutorial(bias: Bias, count: int) -> None:
    """450 + 2400 + 48000 + 10080 + 840 weights; the tutorial's network, with biases everywhere, has 62,006."""
    assert sum(p.numel() for p in LeNet(bias).parameters()) == count


def test_forward_is_the_tutorial_network_written_as_a_list(rng: torch.Generator) -> None:
    ours, x = random_model(rng), torch.randn(3, 3, 32, 32, generator=rng)
    layers = {name: ours.get_submodule(name) for name in LAYERS}
    conv, fc = nn.MaxPool2d(2), nn.ReLU()
    theirs = nn.Sequential(
        layers["conv1"], nn.ReLU(), conv, layers["conv2"], nn.ReLU(), conv, nn.Flatten(),
        layers["fc1"], fc, layers["fc2"], fc, layers["fc3"],
    )  # fmt: skip
    assert torch.equal(ours(x), theirs(x))
    assert (ours(x) < 0).any()  # no ReLU behind fc3


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_pooling_of_integers_is_pooling_of_floats(dtype: torch.dtype, rng: torch.Generator) -> None:
    x = torch.randint(-128, 128, (2, 6, 28, 28), generator=rng).to(dtype)
    assert torch.equal(model._max_pool(x).double(), nn.functional.max_pool2d(x.double(), 2))


def test_a_convolution_is_a_product_with_unfolded_patches(rng: torch.Generator) -> None:
    x = torch.randn(4, 6, 14, 14, generator=rng, dtype=torch.float64)
    weight = torch.randn(16, 6, 5, 5, generator=rng, dtype=torch.float64)
    product = model.unfold(x, weight) @ weight.flatten(1).T  # (n * 100, 16)
    expected = nn.functional.conv2d(x, weight).permute(0, 2, 3, 1).reshape(-1, 16)
    torch.testing.assert_close(product, expected)


def test_recorded_activations_are_the_layers_own(rng: torch.Generator) -> None:
    ours, x = random_model(rng), torch.randn(3, 3, 32, 32, generator=rng)
    seen = record_activations(ours, x)
    assert torch.equal(seen.inputs["conv1"], x)
    assert torch.equal(seen.outputs["fc3"], ours(x))
    assert (seen.outputs["conv1"] < 0).any()  # before ReLU
    pooled = nn.functional.max_pool2d(seen.outputs["conv1"].relu(), 2)
    assert torch.equal(seen.inputs["conv2"], pooled)


@pytest.mark.parametrize("bias", BIASED)
def test_the_float_file_gives_the_model_back(bias: Bias, rng: torch.Generator, tmp_path: Path) -> None:
    ours = random_model(rng, bias)
    for name in ("a", "b"):
        model.save(ours.state_dict(), {"bias": bias, "seed": 0, "epochs": 1}, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = model.load(tmp_path / "a")
    assert again.bias == bias
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc1.weight", torch.zeros(120, 399), r"fc1\.weight is torch\.float32 \(120, 399\)"),
        ("fc1.weight", torch.zeros(120, 400, dtype=torch.float64), r"fc1\.weight is torch\.float64"),
        ("fc3.bias", torch.full((10,), float("inf")), r"fc3\.bias holds a number that is not finite"),
        ("fc2.bias", None, r"no tensor 'fc2\.bias'"),
    ],
)
def test_a_wrong_float_file_names_the_tensor(
    name: str, value: Tensor | None, message: str, rng: torch.Generator, tmp_path: Path
) -> None:
    tensors = {key: tensor for key, tensor in random_model(rng).state_dict().items() if key != name}
    safetensors.torch.save_file(tensors if value is None else {**tensors, name: value}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=message):
        model.load(tmp_path / "m.safetensors")


# --- data -------------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, **changes: Any) -> str:
    """The layout of uoft-cs/cifar10, four images a split."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]
    columns = {"img": images, "label": [0, 9, 3, 3], **changes}
    rows = datasets.Dataset.from_dict({name: column for name, column in columns.items() if column is not None})
    for split in ("train", "test"):
        (folder / "plain_text").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_digits_are_a_fixed_split_and_fill_their_range() -> None:
    digits = data.load()
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.fingerprint == data.load().fingerprint
    assert digits.train.pixels.shape[1:] == (3, 32, 32)
    x = data.normalize(digits.test.pixels)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert torch.equal(digits.test.labels.bincount(), torch.tensor([36, 36, 35, 37, 36, 37, 36, 36, 35, 36]))
    known = {row.numpy().tobytes() for row in digits.train.pixels}
    assert sum(row.numpy().tobytes() in known for row in digits.test.pixels) == 0


def test_normalization_is_the_tutorials() -> None:
    """Pixels / 255, mean 0.5, standard deviation 0.5."""
    pixels = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(data.normalize(pixels), (torch.arange(256) / 255 - 0.5) / 0.5)


def test_a_folder_in_the_layout_of_cifar10(tmp_path: Path) -> None:
    loaded = data.load(write_folder(tmp_path / "folder"))
    draw = np.random.default_rng(0)
    first = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(loaded.train.pixels[0].permute(1, 2, 0).numpy(), first)
    assert loaded.test.labels.tolist() == [0, 9, 3, 3]
    assert loaded.flips


def test_calibration_images_depend_on_the_seed_alone() -> None:
    train_images = data.load().train
    assert torch.equal(train_images.draw(9, 1), train_images.draw(9, 1))
    assert not torch.equal(train_images.draw(9, 1), train_images.draw(9, 2))
    assert len(train_images.draw(10**6, 0)) == len(train_images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img": None}, "no column 'img'; its columns are label"),
        ({"label": None}, "no column 'label'; its columns are img"),
        ({"label": [0, 1, 2, 10]}, "image 3 has the label 10"),
        ({"label": ["a", "b", "c", "d"]}, "image 0 has the label 'a'"),
        ({"img": [Image.new("RGB", (28, 28))] * 4}, "image 0 is uint8 of shape 28x28x3"),
        ({"img": [Image.new("RGB", (32, 32))] * 3 + [Image.new("L", (32, 32))]}, "image 3 is uint8 of shape 32x32"),
    ],
)
def test_a_folder_of_something_else_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        data.load(write_folder(tmp_path / "folder", **changes))


def test_a_missing_split_or_folder_is_refused(tmp_path: Path) -> None:
    folder = Path(write_folder(tmp_path / "folder"))
    next((folder / "plain_text").glob("test*")).unlink()
    with pytest.raises(InputError, match="no split 'test'; its splits are train"):
        data.load(str(folder))
    with pytest.raises(InputError, match="neither as a folder nor on the Hub"):
        data.load(str(tmp_path / "nothing"))


@pytest.mark.slow
def test_cifar10_has_the_ranges_that_are_known_of_it() -> None:
    """Input range (-1, 1); mean +- 3 sigma close to (-1.57, 1.47), here after JPEG."""
    folder = DATA / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"no images at {folder}")
    from lenet_baseline.maxabs import full_range, three_sigma_range

    images = data.load(str(folder)).train.draw(1024, 0)
    assert full_range(images) == (-1, 1)
    assert three_sigma_range(images) == pytest.approx((-1.55, 1.46), abs=0.03)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_is_seeded_learns_and_leaves_the_global_generator_alone() -> None:
    digits = data.load()
    before = torch.get_rng_state()
    first, second = (train.train(digits, "fc3", 0, 2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    assert train.accuracy(train.logits(first, digits.test), digits.test) > 0.8


def test_a_model_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load()
    first, path = train.train_or_reuse(tmp_path, digits, "none", 0, 1)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    again, same = train.train_or_reuse(tmp_path, digits, "none", 0, 1)
    assert same == path
    assert torch.equal(again.weight("fc3"), first.weight("fc3"))
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        train.train_or_reuse(tmp_path, digits, "none", 0, 1)


def test_another_recipe_is_another_file(tmp_path: Path) -> None:
    digits = data.load()
    paths = {
        train.model_path(tmp_path, digits, bias, seed, epochs)
        for bias in BIASED
        for seed in (0, 1)
        for epochs in (1, 2)
    }
    assert len(paths) == 12


def test_accuracy_counts_by_hand() -> None:
    images = data.Images(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.tensor([1, 0, 2]))
    scores = torch.tensor([[0.0, 5, 1], [2, 2, 1], [9, 1, 3]])
    assert train.accuracy(scores, images) == pytest.approx(2 / 3)
