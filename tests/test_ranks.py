"""Several processes at one run, joined by gloo: the bytes of one; and what is said when one of them is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq.compute.distributed import PROCESS_ENDED, Ranks
from gptq.solver.hessian import HessianAccumulator
from tests.conftest import MakeModel
from tests.test_journal import partial_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available() and hasattr(os, "fork")),
        reason="this torch cannot join processes with gloo",
    ),
]


def run(source: Path, folder: Path, cases: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What each process said at last, by case and rank; one that was killed said nothing."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.many_ranks", str(source), str(folder), json.dumps(cases)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=1200)
    said = {case["out"]: ["killed"] * case["ranks"] for case in cases}
    for line in done.stdout.splitlines():
        out, rank, words = json.loads(line)
        said[out][rank] = words
    assert done.returncode == 0, done.stderr
    return said


def load_config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())  # type: ignore[no-any-return]


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_one_two_and_four_ranks_write_the_same_bytes(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    """And of the weights of experts, each reads those of its own only; all together read them as often as one."""
    config = {"effort": "balanced"}
    cases: list[dict[str, Any]] = [{"out": f"r{n}", "ranks": n, "config": config, "count": True} for n in (1, 2, 4)]
    cases.append({"out": "r3", "ranks": 3, "config": config, "run": {"batch_size": 1}, "count": True})
    said = run(make_model(kind), tmp_path, cases)
    one = content(tmp_path / "r1")
    assert len(one) >= 4
    assert all(content(tmp_path / case["out"]) == one for case in cases)
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())
    alone = [int(word) for word in said["r1"][0].split()[:2]]
    assert (min(alone) > 0) == (kind == "mixtral")
    experts = load_config(tmp_path / "r1").get("num_local_experts", 1)
    for case in cases:
        read = [[int(word) for word in words.split()[:2]] for words in said[case["out"]]]
        assert [sum(bytes_of) for bytes_of in zip(*read, strict=True)] == alone
        most = -(-experts // case["ranks"])  # experts of one process
        assert all(experts * nbytes <= most * whole for own in read for nbytes, whole in zip(own, alone, strict=True))


def test_more_ranks_than_experts(make_model: MakeModel, tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [{"out": f"r{n}", "ranks": n, "config": {}} for n in (1, 3)]
    said = run(make_model("mixtral", num_local_experts=2), tmp_path, cases)
    assert said["r3"] == ["done"] * 3
    assert content(tmp_path / "r1") == content(tmp_path / "r3")


def test_ranks_share_the_widths_that_are_measured(make_model: MakeModel, tmp_path: Path) -> None:
    config = {"effort": "fast", "target_bits": 4.5}
    cases: list[dict[str, Any]] = [{"out": f"r{n}", "ranks": n, "config": config, "count": True} for n in (1, 2, 3)]
    said = run(make_model("llama"), tmp_path, cases)
    assert content(tmp_path / "r1") == content(tmp_path / "r2") == content(tmp_path / "r3")
    measured = {out: [int(words.split()[2]) for words in own] for out, own in said.items()}
    (alone,) = measured["r1"]
    for own in measured.values():
        assert sum(own) == alone
        assert max(own) - min(own) <= 2  # dealt in turns, forwards and backwards


def test_a_lost_rank_ends_the_run_and_any_number_goes_on(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama", num_hidden_layers=3)
    stops = [("first", 0), ("second", 1)]  # the one that writes, and one that does not
    cases: list[dict[str, Any]] = [{"out": "whole", "ranks": 1, "config": {}}]
    cases += [{"out": name, "ranks": 2, "config": {}, "stop": [rank, 10]} for name, rank in stops]
    said = run(source, tmp_path, cases)
    assert said["first"][0] == said["second"][1] == "killed"
    assert said["first"][1].startswith(PROCESS_ENDED)
    assert said["second"][0].startswith(PROCESS_ENDED)
    assert "keeps 1 finished of 3 blocks, and the command that began it goes on" in said["second"][0]
    assert all(partial_of(tmp_path / name).is_dir() and not (tmp_path / name).exists() for name, _ in stops)
    again = [{"out": "first", "ranks": 3, "config": {}}, {"out": "second", "ranks": 1, "config": {}}]
    assert run(source, tmp_path, again) == {"first": ["done"] * 3, "second": ["done"]}
    assert content(tmp_path / "first") == content(tmp_path / "second") == content(tmp_path / "whole")


@pytest.mark.parametrize(("kind", "ranks", "together"), [("llama", 2, True), ("mixtral", 3, False)])
def test_ranks_tune_a_block_together(
    make_model: MakeModel, tmp_path: Path, kind: str, ranks: int, together: bool
) -> None:
    """Each takes its own pieces of a step: windows that are run together, or single ones."""
    config = {"effort": "best", "tune_steps": 3, "bits": 3}
    cases: list[dict[str, Any]] = [
        {
            "out": f"r{n}", "ranks": n, "config": config, "pieces": True,
            "tune_windows": 4, "tune_tokens": 2048 if together else 1,
        }
        for n in (1, ranks)
    ]  # fmt: skip
    said = run(make_model(kind), tmp_path, cases)
    assert content(tmp_path / f"r{ranks}") == content(tmp_path / "r1")
    (alone,), own = ([int(words) for words in said[f"r{n}"]] for n in (1, ranks))
    assert sum(own) == alone
    if not together:  # otherwise a step has one piece
        assert max(own) <= 0.5 * alone


def test_torchrun_starts_the_command(make_model: MakeModel, text_file: str, tmp_path: Path) -> None:
    source = str(make_model("llama"))
    options = ["--calibration", text_file, "--samples", "8", "--seq-len", "16", "--group-size", "16", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(number), "-m", "gptq"]
        command = [*launcher, "quantize", source, str(tmp_path / f"o{number}"), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("bits per weight") == 1  # one process speaks
    assert content(tmp_path / "o1") == content(tmp_path / "o2")


def test_windows_and_pieces_are_shared_out_once() -> None:
    for size in range(1, 6):
        ranks = [Ranks(rank, size) for rank in range(size)]
        for count in (0, 3, 16, 17):
            assert [i for one in ranks for i in one.own_windows(count)] == list(range(count))
            assert all(sum(one.owns(piece) for one in ranks) == 1 for piece in range(count))


def test_alone_nothing_goes_round() -> None:
    alone, x = Ranks(), torch.eye(3)
    assert list(alone.gather_windows([(x, None)], 1, 2)) == [(x, None)]
    assert (alone.minimum(4), alone.total(4), alone.any(True), alone.broadcast_text("so")) == (4, 4, True, "so")
    sums = HessianAccumulator(3, torch.device("cpu"), alone)
    sums.add(x)
    assert torch.equal(sums.mean(), x / 3)
