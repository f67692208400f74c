"""Quantizes in several processes that are forked, so that the libraries are imported once for all of them.

    python -m tests.many_ranks SOURCE FOLDER CASES

CASES is JSON: a list of {"out": name, "ranks": number, "config": options, "stop": [rank, blocks] or null,
"count": bool, "tune_tokens": number, "tune_windows": number, "pieces": bool}. Prints for each case the outcome in every
process: "done", or what the error said; with "count", the bytes of experts' weights that the process has read, those
read ahead, and how many widths of layers it has measured; with "pieces", how many pieces of tuning it has taken.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptq import InputError, QuantConfig, quantize
from gptq.checkpoint.prefetch import ReadAhead
from gptq.checkpoint.reader import Source
from gptq.compute import device_profile
from gptq.config import TUNE_TOKENS, TUNE_WINDOWS
from gptq.pipeline import search, tune
from gptq.pipeline.run import Observer
from gptq.pipeline.tune import BlockToTune

torch.set_num_threads(1)
# Small enough that the processes share the work on tiny layers; panels are a multiple of simd.WIDE.
SMALL = replace(device_profile.CPU, hessian_rows=32, solve_rows=20)
device_profile.PROFILES["cpu"] = SMALL, SMALL


class Leaves(Observer):
    """Ends the process without a word when so many layers are done."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def layer_done(self, block: int, name: str, weights: int) -> None:
        self.layers -= 1
        if not self.layers:
            os._exit(3)


class Counted:
    """Counts the bytes of experts' weights that this process reads, at once or ahead, and the widths it measures."""

    def __init__(self) -> None:
        self.read = self.ahead = self.measured = 0
        measure = search._measure

        def counting_measure(*args: Any) -> float:
            self.measured += 1
            return measure(*args)

        search._measure = counting_measure  # type: ignore[assignment]
        read, start = Source.read, ReadAhead.start

        def counting_read(source: Source, name: str, *args: Any) -> Tensor:
            found = read(source, name, *args)
            self.read += found.numel() * source.tensors[name].dtype.itemsize * (".experts." in name)
            return found

        def counting_start(ahead: ReadAhead, names: list[str]) -> None:
            self.ahead += sum(ahead._source.stored_bytes(name) for name in names if ".experts." in name)
            start(ahead, names)

        Source.read, ReadAhead.start = counting_read, counting_start  # type: ignore[method-assign, assignment]


def count_pieces() -> list[int]:
    """Return a list that gets the number of windows of each piece that this process takes from now on."""
    found: list[int] = []
    distance = BlockToTune.distance

    def counting(block: BlockToTune, call: Any, windows: list[int]) -> Tensor:
        found.append(len(windows))
        return distance(block, call, windows)

    BlockToTune.distance = counting  # type: ignore[method-assign, assignment]
    return found


def run(source: str, out: Path, case: dict[str, Any], rank: int, meeting: str) -> str:
    windows = torch.randint(1, 300, (9, 12), generator=torch.Generator().manual_seed(0))
    stop = case.get("stop")
    observer = Leaves(stop[1]) if stop and stop[0] == rank else Observer()
    counted = Counted() if case.get("count") else None
    pieces = count_pieces() if case.get("pieces") else None
    vars(tune)["TUNE_TOKENS"] = case.get("tune_tokens", TUNE_TOKENS)
    vars(tune)["TUNE_WINDOWS"] = case.get("tune_windows", TUNE_WINDOWS)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=case["ranks"])
    try:
        config = QuantConfig(**{"group_size": 16, **case["config"]})
        quantize(source, out, config, calibration=windows, device="cpu", observer=observer, **case.get("run", {}))
    except InputError as error:
        return str(error)
    dist.destroy_process_group()
    if pieces is not None:
        return str(len(pieces))
    return f"{counted.read} {counted.ahead} {counted.measured}" if counted else "done"


def main(source: str, folder: str, cases: str) -> None:
    for case in json.loads(cases):
        with tempfile.TemporaryDirectory() as meeting:
            children = []
            for rank in range(case["ranks"]):
                child = os.fork()
                if not child:
                    said = run(source, Path(folder) / case["out"], case, rank, f"{meeting}/store")
                    os.write(1, f"{json.dumps([case['out'], rank, said])}\n".encode())  # in one piece
                    os._exit(0)
                children.append(child)
            for child in children:
                os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
