"""Load labelled images: CIFAR-10 from the Hub or a folder, or scikit-learn's handwritten digits without a download."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from gptq.errors import InputError
from lenet_baseline.model import IMAGE

DIGITS = "digits"  # name of the data set that needs no download
IMAGE_COLUMNS = ("img", "image")  # column names: img in uoft-cs/cifar10, image in most other data sets
CLASSES = 10


@dataclass(frozen=True)
class Images:
    """Images and their labels."""

    pixels: Tensor  # (n, 3, 32, 32) uint8
    labels: Tensor  # (n,) int64, 0 to 9

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, count: int, seed: int) -> Tensor:
        """Draw at most `count` images at random with the seed; normalized, (n, 3, 32, 32) float32."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return normalize(self.pixels[chosen])


@dataclass(frozen=True)
class Data:
    """Training and test images of a data set, with its training defaults."""

    name: str
    train: Images
    test: Images
    flips: bool  # whether training may mirror images: a mirrored photograph is valid, a mirrored digit is not
    epochs: int  # default number of training epochs
    batch_size: int  # training images per step

    @property
    def fingerprint(self) -> str:
        """Hash of all training and test pixels and labels."""
        digest = hashlib.sha256()
        for images in (self.train, self.test):
            digest.update(images.pixels.numpy().tobytes())
            digest.update(images.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def normalize(pixels: Tensor) -> Tensor:
    """Map uint8 0 to 255 to float32 -1 to 1."""
    return pixels.float() / 127.5 - 1


def load(source: str = DIGITS) -> Data:
    """Load `digits`, or a folder or Hub data set like uoft-cs/cifar10: splits train and test, columns img and label.

    Raises:
        InputError: the data set cannot be read, lacks a split or a column, or has an image of another shape or an
            invalid label.
    """
    if source == DIGITS:
        return _digits()
    try:
        splits = load_dataset(source)
    except Exception as error:  # datasets raises whatever its readers raise
        where = "read" if Path(source).exists() else "found, neither as a folder nor on the Hub"
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"the data set {source!r} could not be {where} ({reason}). Pass a folder in the layout of uoft-cs/cifar10, "
            f"or leave --data out for the digits that need no download"
        ) from error
    missing = [name for name in ("train", "test") if name not in splits]
    if missing:
        raise InputError(f"{source} has no split {missing[0]!r}; its splits are {', '.join(splits)}")
    name = Path(source).name if Path(source).exists() else source
    train, test = (_images(splits[split], f"{source}, split {split}") for split in ("train", "test"))
    return Data(name, train, test, flips=True, epochs=12, batch_size=128)


def _digits() -> Data:
    """scikit-learn's 1,797 digits of 8x8 pixels, scaled up to 3x32x32, in one fixed and stratified 4 to 1 split."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None]  # (n, 1, 8, 8)
    large = functional.interpolate(small * (255 / 16), size=IMAGE[1:], mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).expand(-1, *IMAGE).contiguous()  # (n, 3, 32, 32)
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    train, test = (Images(pixels[part], labels[part]) for part in map(torch.from_numpy, parts))
    return Data(DIGITS, train, test, flips=False, epochs=15, batch_size=32)


def _images(rows: Dataset, source: str) -> Images:
    """Read the images and labels of a split; raises InputError if one is invalid."""
    columns = rows.column_names
    column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if column is None or "label" not in columns:
        wanted = "label" if column else "img"
        raise InputError(f"{source} has no column {wanted!r}; its columns are {', '.join(columns)}")
    if len(rows) == 0:
        raise InputError(f"{source} holds no images")
    pixels = np.empty((len(rows), IMAGE[1], IMAGE[2], IMAGE[0]), np.uint8)
    labels = torch.empty(len(rows), dtype=torch.int64)
    index = 0
    try:
        for index, row in enumerate(tqdm(rows, desc=f"reading {source}", unit="image", leave=False)):
            image = np.asarray(row[column])
            _check_image(image, row["label"], f"{source}: image {index}")
            pixels[index], labels[index] = image, row["label"]
    except InputError:
        raise
    except Exception as error:  # Pillow raises whatever its readers raise
        raise InputError(f"{source}: an image from number {index} on could not be decoded ({error})") from error
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


def _check_image(image: Any, label: Any, where: str) -> None:
    """Raises InputError if the image is not 32x32 RGB in uint8, or the label is not a class."""
    if image.shape != (IMAGE[1], IMAGE[2], IMAGE[0]) or image.dtype != np.uint8:
        raise InputError(
            f"{where} is {image.dtype} of shape {'x'.join(map(str, image.shape))}; "
            f"this LeNet reads RGB images of 32x32 pixels, uint8 32x32x3"
        )
    if not isinstance(label, int) or not 0 <= label < CLASSES:
        raise InputError(f"{where} has the label {label!r}; labels are whole numbers from 0 to {CLASSES - 1}")
