"""Compute with torch as it is in a fresh process, whatever modes the caller has set; set them again afterwards."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_users = [0]  # callers inside `_float32_as_default`, of all threads
_before = [torch.float32]  # the default dtype when the first of them came


@contextmanager
def fresh_torch_state() -> Iterator[None]:
    """Inside: no inference mode, no autocast, float32 as the default dtype, the CPU as the default device.

    Tensors made in inference mode keep no count of changes, autocast and another default dtype round numbers: the same
    input would give other bytes, or an error.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_float32_as_default())
        yield


@contextmanager
def _float32_as_default() -> Iterator[None]:
    """Make float32 the default dtype, which is one for all threads, until the last caller has left."""
    with _lock:
        if not _users[0]:
            _before[0] = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _users[0] += 1
    try:
        yield
    finally:
        with _lock:
            _users[0] -= 1
            if not _users[0]:
                torch.set_default_dtype(_before[0])
