"""What has to hold on a real, trained model; skipped, with the reason, where the data is not at hand."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptq import QuantConfig, load, perplexity, quantize
from gptq.output import verify
from tests.conftest import DATA, MakeModel

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stories_at_every_width(
    bits: int, group_size: int, sym: bool, stories: Path, novel_halves: tuple[str, str], tmp_path: Path
) -> None:
    """down_proj has 172 inputs, which no usual group size divides; GPTQ beats round-to-nearest in text and layers."""
    first, second = novel_halves
    found = {}
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        config = QuantConfig(bits=bits, group_size=group_size, sym=sym, method=method, seq_len=256, num_samples=64)
        result = quantize(stories, out, config, calibration=first)
        found[method] = perplexity(out, second, seq_len=256, windows=64).perplexity
    assert all(layer.error < layer.rtn_error for layer in result.layers)
    if bits < 4 or (bits == 4 and sym):  # closer to the original, the difference drowns in which text calibrates
        assert found["gptq"] < found["rtn"]
    if group_size == 32:
        assert any("down_proj in 5 layers" in note and "a last one of 12" in note for note in result.notes)
    assert verify.verify(out).problems == []
    content = verify.inspect(out)
    expected = 172 if group_size == -1 else group_size
    assert {layer.group_size for layer in content.layers if "down_proj" in layer.name} == {expected}


@pytest.mark.parametrize(
    ("fixture", "dtype"),
    [("gptqmodel-w4g32-sym", "bfloat16"), ("gptqmodel-w4g32-asym-v2", "bfloat16"),
     ("llmcompressor-w4-channel-sym", "float32")],
)  # fmt: skip
def test_a_checkpoint_by_another_tool_gives_its_logits(fixture: str, dtype: str) -> None:
    """In the dtype that the other tool computed in; no further from it than rounding the activations takes us."""
    folder = DATA / "fixtures" / fixture
    if not folder.is_dir():
        pytest.skip(f"no fixture at {folder}")
    reference = load_file(folder / "reference.safetensors")
    ids, theirs = reference["input_ids"].long(), reference["logits"].float()
    with torch.no_grad():
        logits = load(folder, dtype=dtype)(input_ids=ids).logits.float()
        exact = load(folder, dtype="float32")(input_ids=ids).logits
    rounding = (logits - exact).abs()  # of every activation to 8 bits; nothing where both compute in float32
    assert (logits - theirs).abs().max() <= 2 * rounding.max() + 1e-4
    assert (logits - theirs).square().mean() <= 2 * rounding.square().mean() + 1e-8
    found = verify.verify(folder)
    assert (found.recorded, found.problems) == (False, [])
    assert len(verify.inspect(folder).layers) == 35


MEASURE = """
import sys
from pathlib import Path
import torch
from gptq import QuantConfig, quantize
windows = torch.randint(1, 300, (4, 32), generator=torch.Generator().manual_seed(0))
quantize(sys.argv[1], sys.argv[2], QuantConfig(group_size=128), calibration=windows)
print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
"""
COMPARE = """
import sys
from pathlib import Path
from gptq.evaluation import evaluate, original_logits
original_logits.MOST_OF_MEMORY = 0  # as if the original did not fit: it is read block by block
evaluate.compare(sys.argv[2], sys.argv[1], sys.argv[3], seq_len=32, windows=4)
print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_blocks(make_model: MakeModel, text_file: str, tmp_path: Path) -> None:
    """One thread for each of two runs at the same time, which is quicker than two threads for one after the other."""
    sources = {
        blocks: make_model("llama", num_hidden_layers=blocks, hidden_size=512, intermediate_size=1024)
        for blocks in (24, 48)
    }

    def measured(blocks: int, script: str) -> int:
        command = [sys.executable, "-c", script, str(sources[blocks]), str(tmp_path / f"out{blocks}"), text_file]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        return int(subprocess.run(command, check=True, capture_output=True, text=True, env=alone).stdout)

    with ThreadPoolExecutor(2) as pool:
        peaks, comparing = (
            dict(zip(sources, pool.map(measured, sources, [script] * 2), strict=True)) for script in (MEASURE, COMPARE)
        )
    size = (sources[48] / "model.safetensors").stat().st_size
    assert size > 200e6
    # 24 blocks are 210 MB. What the allocator keeps differs by 20 MB from run to run and more between machines. It
    # grows over the first blocks (with MKL by 66 to 86 MB from 6 to 24), so the law is about later ones.
    assert peaks[48] - peaks[24] < 60e6, peaks
    assert comparing[48] - comparing[24] < 80e6, comparing  # of which the quantized blocks, held whole, are 31 MB
