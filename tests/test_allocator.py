"""malloc's settings: what they keep, and that they end with the run."""

import platform
import subprocess
import sys

import pytest

from gptq.cli import main
from gptq.compute import allocator
from tests.conftest import MakeModel

PROGRAM = """
import ctypes, resource
from gptq.compute.allocator import malloc_policy, return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def kept(size):  # bytes that stay resident after a block was used and freed
    return_freed_memory()
    before = resident()
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
    return resident() - before

with malloc_policy(frugal=False):
    print(kept(2**24) > 2**23, kept(2**26) > 2**23)
with malloc_policy(frugal=True):
    print(kept(2**24) > 2**23, kept(2**26) > 2**23)
print(kept(2**24) > 2**23, kept(2**26) > 2**23)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_blocks_are_kept_by_a_generous_policy_and_afterwards_as_usual() -> None:
    """16 MiB are below the generous and the usual threshold (32 MiB), above the frugal one; 64 MiB are above all."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "False", "True", "False"]


@pytest.mark.slow
def test_planning_leaves_malloc_alone(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocator, "_set_thresholds", lambda *_: pytest.fail("malloc was set"))
    assert main(["plan", str(make_model("llama")), "--json"]) == 0
    assert "peak_bytes" in capsys.readouterr().out
