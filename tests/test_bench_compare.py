"""What the script calls a change: more than the noise of its own repetitions, between runs of the same work."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import load_script

script = load_script("bench_compare")


def runs(*seconds: float, **more: Any) -> dict[str, Any]:
    facts = {"torch": "2", "cores": 2, "windows": 4, "tokens": 8}
    return facts | {"runs": [{"effort": "fast", "stages": {"read": s, "solve": 1.0}} for s in seconds]} | more


def compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any], after: dict[str, Any], *options: str
) -> int:
    for name, content in (("before", before), ("after", after)):
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["bench_compare.py", str(tmp_path / "before"), str(tmp_path / "after"), *options])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return int(ended.value.code or 0)


QUIET, SHIFTED = (1.0, 1.01, 0.99, 1.0, 1.005), (1.1, 1.11, 1.09, 1.1, 1.105)


def test_a_shift_beyond_the_noise_is_a_change_and_one_within_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, monkeypatch, runs(*QUIET), runs(*QUIET[::-1])) == 0
    assert compare(tmp_path, monkeypatch, runs(*QUIET), runs(*SHIFTED)) == 1
    said = capsys.readouterr().out
    assert "runs/fast/stages/read" in said
    assert "+10.0 %" in said
    assert "1 of 2 figures changed" in said
    noisy = runs(0.7, 1.3, 1.0, 0.8, 1.2)
    assert compare(tmp_path, monkeypatch, noisy, runs(*SHIFTED)) == 0
    assert compare(tmp_path, monkeypatch, runs(*QUIET), runs(*SHIFTED), "--least", "11") == 0


def test_the_threshold_is_three_standard_errors_of_the_medians() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]  # median 3, deviations 2 1 0 1 2 with median 1
    assert script.spread(values) == pytest.approx(1.4826**2 / 5)
    limit = 3 * (2 * 1.4826**2 / 5) ** 0.5
    for shift, count in ((0.99 * limit, 0), (1.01 * limit, 1)):
        assert len(script.changes({"t": values}, {"t": [v + shift for v in values]}, 0.0)) == count


def test_a_single_run_has_no_noise_to_hide_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(tmp_path, monkeypatch, runs(1.0), runs(1.01)) == 0  # below --least
    assert compare(tmp_path, monkeypatch, runs(1.0), runs(1.03)) == 1


def test_other_work_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(tmp_path, monkeypatch, runs(1.0), runs(1.0, tokens=16)) == 2
    assert compare(tmp_path, monkeypatch, runs(1.0), {"torch": "2", "windows": 4, "tokens": 8, "other": 1.0}) == 2
    (tmp_path / "broken").write_text("{")
    monkeypatch.setattr(sys, "argv", ["bench_compare.py", str(tmp_path / "broken"), str(tmp_path / "broken")])
    with pytest.raises(SystemExit, match="2"):
        script.main()
