"""The original model's predictions on the calibration windows, kept in a file, and the distance of a model from them.

Of each token the most probable next tokens are kept. KL is taken between distributions over these and "any other", a
lower bound of the whole KL (merging outcomes never raises it), equal to it if all tokens are kept.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptq.checkpoint.small_files import write_file
from gptq.pipeline.run import Observer

KEPT = 1024  # tokens of the vocabulary that are kept at each position; 6 bytes each
SMALLEST = 1e-9  # probability in place of 0 inside a logarithm
LOWEST = -6e4  # log-probability in place of -infinity, which float16 can hold
CHUNK_LOGITS = 2**25  # logits whose softmax is taken at a time


@dataclass(frozen=True)
class Teacher:
    """Log-probabilities of the original model, on disk and mapped into memory."""

    log_probabilities: np.memmap[Any, Any]  # (windows, positions, kept) float16
    tokens: np.memmap[Any, Any]  # (windows, positions, kept) int32
    vocabulary: int

    def divergence(self, window: int, logits: Tensor) -> Tensor:
        """Return KL(original || model) in nats, the mean over positions; gradients reach `logits`.

        Args:
            logits: of the model, (positions, vocabulary).
        """
        total = logits.new_zeros((), dtype=torch.float32)
        step = max(1, CHUNK_LOGITS // logits.shape[1])
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            total = total + self._divergences(window, part, logits[part].float()).sum()
        return total / len(logits)

    def _divergences(self, window: int, part: slice, logits: Tensor) -> Tensor:
        log_p = torch.from_numpy(np.array(self.log_probabilities[window, part])).to(logits.device).float()
        tokens = torch.from_numpy(np.array(self.tokens[window, part])).to(logits.device).long()
        log_q = logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True)  # (positions, kept)
        p = log_p.exp()
        found = (p * (log_p - log_q)).sum(1)  # (positions,)
        if tokens.shape[1] < self.vocabulary:
            rest_p = (1 - p.sum(1)).clamp(min=SMALLEST)
            rest_q = (1 - log_q.exp().sum(1)).clamp(min=SMALLEST)
            found = found + rest_p * (rest_p.log() - rest_q.log())
        return found


def record_teacher(folder: Path, logits: Iterator[Tensor], windows: int, positions: int, observer: Observer) -> Teacher:
    """Write the predictions of a model into files in `folder`, or open what an earlier run has written there.

    Args:
        logits: of each window, (positions, vocabulary); taken only if the files are not there, or damaged.
    Raises:
        OSError: the disk is too small.
    """
    done = folder / "teacher.done"
    teacher = _open(done, windows, positions)
    if teacher is not None:
        return teacher
    if done.exists():
        observer.note(f"what {folder} kept of the original's predictions is damaged, and is computed again")
    for window, one in enumerate(logits):
        if teacher is None:
            vocabulary = one.shape[1]
            teacher = Teacher(*_map_files(folder, (windows, positions, min(vocabulary, KEPT))), vocabulary)
        _record_window(teacher, window, one)
        observer.window_done(window + 1, windows)
    if teacher is None:
        raise ValueError("no window has logits")
    teacher.log_probabilities.flush()
    teacher.tokens.flush()
    write_file(done, _describe(teacher))
    return teacher


def _open(done: Path, windows: int, positions: int) -> Teacher | None:
    """Return what an earlier run has written, unless it is not whole."""
    said = done.read_bytes() if done.is_file() else b""
    vocabulary = said.partition(b" ")[0]
    if not re.fullmatch(rb"[1-9]\d{0,8}", vocabulary):
        return None
    shape = windows, positions, min(int(vocabulary), KEPT)
    teacher = Teacher(*_map_files(done.parent, shape), int(vocabulary))
    return teacher if _describe(teacher).encode() == said else None


def _describe(teacher: Teacher) -> str:
    """Return the size of the vocabulary, and a checksum of it and of all that is kept."""
    digest = hashlib.sha256(str(teacher.vocabulary).encode())
    for values, tokens in zip(teacher.log_probabilities, teacher.tokens, strict=True):  # of each window
        digest.update(values)
        digest.update(tokens)
    return f"{teacher.vocabulary} {digest.hexdigest()}"


def _map_files(folder: Path, shape: tuple[int, int, int]) -> tuple[np.memmap[Any, Any], np.memmap[Any, Any]]:
    return _map_file(folder / "teacher.values", np.float16, shape), _map_file(
        folder / "teacher.tokens", np.int32, shape
    )


def _map_file(file: Path, dtype: type[np.generic], shape: tuple[int, int, int]) -> np.memmap[Any, Any]:
    """Map a file into memory, with all its space on disk: a process is killed when a mapped page finds none."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    with file.open("r+b" if file.exists() else "w+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, nbytes)
    return np.memmap(file, dtype, "r+", 0, shape)


def _record_window(teacher: Teacher, window: int, logits: Tensor) -> None:
    kept, step = teacher.tokens.shape[2], max(1, CHUNK_LOGITS // teacher.vocabulary)
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        found = logits[part].float().log_softmax(1).clamp(min=LOWEST).topk(kept, dim=1, sorted=False)
        teacher.log_probabilities[window, part] = found.values.half().cpu().numpy()
        teacher.tokens[window, part] = found.indices.int().cpu().numpy()
