"""Every Triton kernel compiled to machine code for GPUs that are not there: what that code takes and uses.

Limits are those of CUDA's programming guide: 255 registers of a thread; shared memory of a block by compute capability.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # bytes a block may have
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gptq.inference import triton_gemm as g
from gptq.solver import inner_loops_triton as t

TYPES = {"codes": "*u8", "groups": "*i64", "best": "*i64", "words_ptr": "*i32", "scale_ptr": "*fp16", "zero_ptr": "*u8"}
TYPES |= dict.fromkeys(("x_ptr", "weight_ptr"), "*bf16") | {"y_ptr": "*fp32"}
COUNTS = ("rows", "columns", "candidates", "top", "inputs", "outputs", "num_words", "chunks_each", "chunks_of_group")
TYPES |= dict.fromkeys(COUNTS, "i32")
loops = [(t._choose_columns_kernel, {"COLUMNS": 128, "FORM": form}) for form in (1, 2, 3)]
loops += [(t._best_grids_kernel, {"CHUNK_COLUMNS": t.CHUNK_COLUMNS, "FORM": form}) for form in (1, 3)]
loops = [(kernel, sizes | {"PROGRAM_ROWS": t.PROGRAM_ROWS}, t.LAUNCH_OPTIONS) for kernel, sizes in loops]
few = [(g._multiply_few, {"BITS": bits, "CHUNK": chunk, "ROWS": rows, "OUT": g.FEW_OUTPUTS}, {"num_warps": 4})
       for bits, rows, chunk in ((3, 16, 128), (4, 64, 64), (3, 64, 64), (8, 16, 128))]
tile = [(g._dequantize, {"BITS": 3, "CHUNK": 128, "OUT": g.TILE_OUTPUTS}, {"num_warps": 4})]
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for capability in (80, 90, 120):
    for kernel, sizes, options in loops[:: 1 if capability == 90 else 3] + few[: 4 if capability == 90 else 3] + tile:
        signature = {name: "constexpr" if name in sizes else TYPES.get(name, "*fp32") for name in kernel.arg_names}
        whole = [name for name in signature if name.endswith("_ptr") or name in ("inputs", "outputs")]
        attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in whole}
        source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=attrs)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"]), file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        ptx = made.asm["ptx"]
        print(json.dumps({
            "kernel": kernel.fn.__name__, "capability": capability, "shared": made.metadata.shared,
            "registers": int(re.search(r"REG:(\\d+)", usage)[1]), "spilled": int(re.search(r"LOCAL:(\\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\\d+)", usage)[1]), "tensor_cores": "mma" in ptx, "tf32": "tf32" in ptx,
            "exact_division": "div.rn.f32" in ptx,
        }))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="Triton is not installed")
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | cache
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_kernels_compile_for_gpus_without_one_and_fit_these(compiled: list[dict[str, Any]]) -> None:
    assert {one["capability"] for one in compiled} == {80, 90, 120}
    for one in compiled:
        assert one["registers"] <= 255, one
        assert one["spilled"] == one["stack"] == 0, one
        assert one["shared"] <= SHARED_MEMORY[one["capability"]], one


@pytest.mark.slow
def test_products_use_tensor_cores_without_tf32_and_the_solver_divides_exactly(compiled: list[dict[str, Any]]) -> None:
    for one in compiled:
        assert one["tensor_cores"] == (one["kernel"] == "_multiply_few"), one
        assert not one["tf32"], one
        assert one["exact_division"] == (one["kernel"] in ("_choose_columns_kernel", "_best_grids_kernel")), one
