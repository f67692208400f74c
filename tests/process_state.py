"""What a process shares with a library that it calls: settings, random numbers, handlers. Imports nothing of gptq."""

import gc
import locale
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import numpy as np
import torch


def snapshot() -> dict[str, Any]:
    """Everything of the process that a call has no business to change; equal dicts mean that nothing did."""
    root, own = logging.getLogger(), logging.getLogger("gptq")
    matmul = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  # the generator that others use
    return {
        "environment": dict(os.environ),
        "folder": str(os.getcwd()),  # noqa: PTH109
        "locale": locale.setlocale(locale.LC_ALL),
        "umask": _umask(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision of products": (
            torch.get_float32_matmul_precision(),
            *(getattr(backend, "fp32_precision", None) for backend in matmul),
        ),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "numpy's random numbers": (kind, np.asarray(keys).tolist(), *rest),
        "Python's random numbers": random.getstate(),
        "warnings": [str(one) for one in warnings.filters],
        "logging": (root.level, list(root.handlers), own.level, list(own.handlers), own.propagate, own.disabled),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "hooks": (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook, sys.gettrace()),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold()),
        "running threads": sorted(thread.name for thread in threading.enumerate()),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "new modules": _new_modules(),
    }


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def _new_modules() -> tuple[Any, ...]:
    """Where a new layer is made, and the methods of torch.nn.Module that libraries like to replace."""
    with torch.random.fork_rng():
        made = torch.nn.Linear(2, 2)
    kind = torch.nn.Module
    return (
        made.weight.device, made.weight.dtype, made.weight.requires_grad,
        kind.register_parameter, kind.register_buffer, kind.__setattr__, kind.__call__, torch.nn.Linear.forward,
        torch.empty, torch.load, torch.Tensor.to,
    )  # fmt: skip


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before if before[name] != after[name]]
