"""scripts/check_gpu.py, dry: its parts on the CPU at toy sizes, and what it says of a part that fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_gpu.py"


def run(out: Path, *more: str) -> tuple[int, list[str]]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--toy", "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip().splitlines()


@pytest.mark.slow
def test_a_part_that_fails_leaves_the_others_alone_and_the_results_come_last(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--only", "decode,kernels")  # `stages` would make what `decode` loads
    assert code == 1
    results = json.loads((tmp_path / "check_gpu.json").read_text())
    assert json.loads(said[-3]) == results
    assert said[-1].endswith("not right: decode")
    decode, kernels = (results["parts"][name] for name in ("decode", "kernels"))
    assert decode["failed"].startswith("exit code 1; ")
    assert "failed" not in kernels
    assert kernels["outside"] == []
    assert kernels["found"]["solve: error above the CPU's"] == 0
    assert results["machine"]["gpu"] == "none"
