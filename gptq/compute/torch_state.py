"""Compute with torch as it is in a fresh process, whatever modes the caller has set; set them again afterwards."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BUILDING = threading.RLock()  # held while a model is built: that changes state of the whole process
_lock = threading.Lock()
_ATTENTION = SDPBackend.MATH  # the fused kernels' backward adds in an order that changes from run to run
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
        if torch.empty(0, dtype=torch.uint8).device.type != "cpu":  # torch 2.6 does not tell a device of `with`
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_float32_as_default())
        yield


@contextmanager
def same_gradients(device: torch.device) -> Iterator[None]:
    """Inside, backward passes on a GPU give the same numbers at every run, where torch can.

    Attention is made of products, and other operations take their deterministic form. An operation without one runs as
    it is, and torch warns. On a CPU every run gives the same numbers anyway.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(_ATTENTION):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _float32_as_default() -> Iterator[None]:
    """Make float32 the default dtype, which is one for all threads, until the last caller has left.

    The first caller waits while a model is built, which changes it too (`BUILDING`). It is left alone where it is
    float32 already: another thread, of code that does not know of this, may change it to build a model of its own.
    """
    _enter()
    try:
        yield
    finally:
        with nullcontext() if _before[0] == torch.float32 else BUILDING, _lock:
            _users[0] -= 1
            if not _users[0] and _before[0] != torch.float32:
                torch.set_default_dtype(_before[0])


def _enter() -> None:
    with _lock:
        if _users[0]:  # as the thread is that loads a model now, for however long
            _users[0] += 1
            return
    with BUILDING, _lock:
        if not _users[0]:
            _before[0] = torch.get_default_dtype()
            if _before[0] != torch.float32:
                torch.set_default_dtype(torch.float32)
        _users[0] += 1
