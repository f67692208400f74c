"""The package in a process that others have set up: torch's modes are ignored, and are as they were afterwards.

Tests take a small packed model of each format, which is made once.
"""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import gptq
from gptq import QuantConfig, load, quantize
from gptq.compute import matmul
from gptq.compute.threads import _pool
from gptq.compute.torch_state import BUILDING, fresh_torch_state
from gptq.config import GROUP_SIZES
from gptq.formats import FORMATS
from gptq.inference.quant_linear import QuantLinear
from gptq.output import verify
from gptq.pipeline.run import Observer
from gptq.planning.plan import plan_checkpoint
from tests.conftest import MakeModel, threads, write_model
from tests.process_state import changes, snapshot

CONFIG = QuantConfig(bits=4, group_size=32, effort="best", tune_steps=1, format="gptq")
IDS = torch.arange(1, 33).view(2, 16)
PACKED = [name for name in FORMATS if name != "gguf-k"]  # whose blocks are wider than this model


# --- a packed model of each format ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A folder, its model in float32, and the logits of IDS."""

    format: str
    folder: Path
    model: Any
    logits: Tensor

    def layer(self) -> QuantLinear:
        found = self.model.model.layers[0].mlp.down_proj
        assert isinstance(found, QuantLinear)
        return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_model(tmp_path_factory.mktemp("source"), tokenizer, "llama", num_hidden_layers=1)


@pytest.fixture(scope="module", params=PACKED)
def packed(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = make_packed(request.param, source, tmp_path_factory.mktemp("packed"))
    model = load(folder, dtype="float32")
    return Packed(request.param, folder, model, logits(model))


def make_packed(chosen: Any, source: Path, parent: Path) -> Path:
    if chosen.startswith("gguf"):
        pytest.importorskip("gguf")
    quantize(source, parent / chosen, QuantConfig(method="rtn", format=chosen, **options_of(chosen)))
    folder: Path = parent / chosen
    return folder


def options_of(chosen: Any) -> dict[str, Any]:
    """Asymmetric where a format holds that; formats of one grid decide on width and groups themselves."""
    if chosen in GROUP_SIZES:
        return {}
    return {"bits": 4, "group_size": 32, "sym": chosen not in ("gptq_v2", "pack-quantized", "mlx", "gguf")}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
        return found


def test_a_copy_computes_the_same(packed: Packed) -> None:
    saved = io.BytesIO()
    torch.save(packed.model, saved)
    saved.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(packed.model),
        "pickle": pickle.loads(pickle.dumps(packed.model)),  # noqa: S301
        "torch.save": torch.load(saved, weights_only=False),
    }
    copies["state dict"] = copy.deepcopy(packed.model)
    copies["state dict"].load_state_dict(packed.model.state_dict())
    for name, again in copies.items():
        assert torch.equal(logits(again), packed.logits), name


def test_a_cast_changes_activations_and_nothing_that_is_stored(packed: Packed) -> None:
    stored = {name: tensor.clone() for name, tensor in packed.layer().packed().items()}
    ways = (nn.Module.half, nn.Module.bfloat16, nn.Module.float, lambda one: nn.Module.to(one, torch.bfloat16))
    for number, cast in enumerate(ways):
        model = cast(copy.deepcopy(packed.model))  # transformers' own .half() refuses
        cast_logits = logits(model)
        dtype = (torch.float16, torch.bfloat16, torch.float32, torch.bfloat16)[number]
        assert cast_logits.dtype == model.model.norm.weight.dtype == dtype
        assert (cast_logits.float() - packed.logits).norm() < 0.05 * packed.logits.norm()
        held = model.model.layers[0].mlp.down_proj.packed()
        for name, tensor in stored.items():
            assert held[name].dtype == tensor.dtype, name
            assert torch.equal(held[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_layer_goes_to_the_meta_device_and_comes_back(packed: Packed) -> None:
    layer, x = packed.layer(), torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    away = copy.deepcopy(layer).to("meta")
    for name, tensor in layer.packed().items():
        assert away.packed()[name].is_meta
        assert (away.packed()[name].shape, away.packed()[name].dtype) == (tensor.shape, tensor.dtype)
    assert away(x.to("meta")).shape == (3, 64)
    back = away.to_empty(device="cpu")
    back.load_state_dict(layer.state_dict())
    assert torch.equal(back(x), layer(x))


@contextmanager
def all_modes() -> Iterator[None]:
    with ExitStack() as stack:
        for state in (torch.inference_mode, DefaultDtype, deterministic):
            stack.enter_context(state())
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def test_modes_of_the_caller_change_no_logit(packed: Packed) -> None:
    with all_modes(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        loaded = load(packed.folder, dtype="float32")
    assert torch.equal(logits(loaded), packed.logits)
    with all_modes():
        assert torch.equal(packed.model(input_ids=IDS, use_cache=False).logits, packed.logits)
    layer, x = packed.layer(), torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (layer(x).float() - layer(x.float())).norm() < 0.02 * layer(x).norm()
        assert (packed.model(input_ids=IDS).logits - packed.logits).norm() < 0.05 * packed.logits.norm()


def test_several_threads_use_one_model(packed: Packed) -> None:
    fresh = copy.deepcopy(packed.model)  # whose kernels have not been looked up yet
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(logits, [fresh] * 8):
            assert torch.equal(found, packed.logits)


class Logits(Dataset[Tensor]):
    """Rows that a data loader's worker computes with packed models."""

    def __init__(self, models: list[Any]) -> None:
        self.models = models

    def __len__(self) -> int:
        return len(self.models)

    def __getitem__(self, row: int) -> Tensor:
        return logits(self.models[row])


def from_workers(models: list[Any], method: str) -> list[Tensor]:
    """A fork copies locks that other threads of the test process hold at that moment; then another one is needed."""
    for left in (2, 1, 0):
        rows: Any = DataLoader(
            Logits(models), batch_size=None, num_workers=1, multiprocessing_context=method, timeout=60
        )
        try:
            return list(rows)
        except RuntimeError as error:
            if method != "fork" or "timed out" not in str(error) or not left:
                raise
    raise AssertionError


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_worker_computes_the_same(packed: Packed) -> None:
    with threads(2):
        expected = logits(packed.model)
        (found,) = from_workers([packed.model], "fork")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # a worker of a data loader has one thread


@pytest.mark.slow
def test_a_spawned_worker_computes_the_same(source: Path, tmp_path: Path) -> None:
    models = [load(make_packed(chosen, source, tmp_path), dtype="float32") for chosen in PACKED]
    for model, found in zip(models, from_workers(models, "spawn"), strict=True):
        assert torch.equal(found, logits(model))


def add_in_thread() -> None:
    assert _pool(2).submit(sum, [1, 2]).result(20) == 3


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_threads_of_compiled_loops_are_started_anew_after_a_fork() -> None:
    """Those that are used where torch is built without GNU's OpenMP: a forked process has none of its parent's."""
    add_in_thread()
    child = multiprocessing.get_context("fork").Process(target=add_in_thread)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_packed_layer_is_one_graph_for_a_compiler(packed: Packed) -> None:
    layer, x = packed.layer(), torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_packed_layer_is_traced_by_fx(packed: Packed) -> None:
    layer, x = packed.layer(), torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(torch.fx.symbolic_trace(Doubled(layer))(x), 2 * layer(x), rtol=1e-3, atol=1e-3)


class Doubled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.layer(x) * 2
        return doubled


@pytest.mark.slow
def test_a_packed_layer_is_exported_without_this_package(packed: Packed) -> None:
    layer, x = packed.layer(), torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        assert not any("gptq" in str(node.target) for node in exported.graph.nodes)
        saved = io.BytesIO()
        torch.export.save(exported, saved)
        saved.seek(0)
        torch.testing.assert_close(torch.export.load(saved).module()(x), layer(x), rtol=1e-5, atol=1e-5)


# --- the caller's process --------------------------------------------------------------------------------------------


def calls(source: Path, out: Path, text_file: str) -> dict[str, Callable[[], object]]:
    """What a library user calls, on a small model; `best` goes through every stage of a run."""
    windows = IDS.repeat(4, 1)
    short: dict[str, Any] = {"seq_len": 16, "windows": 2}
    return {
        "quantize": lambda: quantize(source, out, CONFIG, calibration=windows),
        "plan": lambda: plan_checkpoint(str(source), CONFIG, None, False),
        "load": lambda: load(out),
        "from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(out),
        "forward": lambda: logits(load(out)),
        "inspect": lambda: verify.inspect(out),
        "verify": lambda: verify.verify(out),
        "perplexity": lambda: gptq.perplexity(out, text_file, **short),
        "compare": lambda: gptq.compare(out, source, text_file, **short),
        "convert": lambda: gptq.convert(out, out.with_name("converted"), "gptq_v2"),
    }


def wait_for_threads(running: int) -> None:
    """Wait until no more threads run: transformers tells those that load weights to stop, and does not wait."""
    until = time.monotonic() + 10
    while threading.active_count() > running and time.monotonic() < until:
        time.sleep(0.02)


def test_calls_leave_the_process_as_it_was_and_print_nothing(
    source: Path, text_file: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers.logging.disable_progress_bar()
    try:
        running = threading.active_count()
        for name, call in calls(source, tmp_path / "out", text_file).items():
            before = snapshot()
            call()
            wait_for_threads(running)
            assert changes(before, snapshot()) == [], name
            assert capfd.readouterr() == ("", ""), name
    finally:
        transformers.logging.enable_progress_bar()


IMPORTING = """
import torch, transformers
from tests.process_state import changes, snapshot
before = snapshot()
import gptq
gptq.quantize, gptq.load, gptq.compare, gptq.convert
print({*changes(before, snapshot())} - {"warnings"})  # scipy and sympy have filters of their own
"""


@pytest.mark.slow
def test_importing_the_package_leaves_the_process_as_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


NOTEBOOK = """
import torch
from gptq import QuantConfig, load, quantize
from gptq.cli.progress import Progress
config = QuantConfig(bits=4, group_size=32, effort="fast")
windows = torch.arange(1, 129).view(8, 16)
first = quantize(SOURCE, OUT + "-silent", config, calibration=windows)
with Progress() as progress:
    second = quantize(SOURCE, OUT, config, calibration=windows, observer=progress)
"""


@pytest.mark.slow
def test_in_a_notebook_progress_is_a_widget_and_the_library_is_silent(source: Path, tmp_path: Path) -> None:
    """Run in a real kernel."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    setting, rest = f"SOURCE, OUT = {str(source)!r}, {str(tmp_path / 'out')!r}", NOTEBOOK.strip().splitlines()
    cells = ["\n".join((setting, *rest[:6])), "\n".join(rest[6:])]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    silent, shown = ([one for one in cell.outputs if one.get("name") != "stderr"] for cell in notebook.cells)
    assert silent == []
    assert any("application/vnd.jupyter.widget-view+json" in one.get("data", {}) for one in shown)


# --- the caller's modes -----------------------------------------------------------------------------------------------


class DefaultDtype(AbstractContextManager[None]):
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.bfloat16)

    def __exit__(self, *_: object) -> None:
        assert torch.get_default_dtype() == torch.bfloat16
        torch.set_default_dtype(torch.float32)


def deterministic() -> AbstractContextManager[None]:
    torch.use_deterministic_algorithms(True)
    return nullcontext()


STATES: dict[str, Any] = {
    "inference mode": torch.inference_mode,
    "another default dtype": DefaultDtype,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
}


@pytest.mark.slow
def test_modes_of_the_caller_change_no_byte(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    source, plain = make_model(num_hidden_layers=1), tmp_path / "plain"
    quantize(source, plain, CONFIG, calibration=windows)
    expected = load(plain)(input_ids=windows).logits
    for name, state in STATES.items():
        out = tmp_path / name
        with state():
            before = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_device())
            own = windows.clone()  # in inference mode, a tensor that counts no changes
            quantize(source, out, CONFIG, calibration=windows if own.is_meta else own)
            model = load(out)
            after = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_device())
            assert before == after
        torch.use_deterministic_algorithms(False)
        for file in plain.iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes(), (name, file.name)
        assert torch.equal(model(input_ids=windows).logits, expected)
        assert verify.verify(out).problems == []


def test_threads_share_one_precision_and_the_last_restores_it() -> None:
    """Whoever leaves first may not restore what the other had set."""
    products: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if products is None:
        pytest.skip("this torch has one precision for all products")
    before, setting = products.fp32_precision, matmul._CPU_PRECISION
    one, two = setting.set_to("bf16"), setting.set_to("ieee")
    one.__enter__()
    two.__enter__()
    assert products.fp32_precision == "ieee"
    one.__exit__(None, None, None)
    assert products.fp32_precision == "ieee"
    two.__exit__(None, None, None)
    assert products.fp32_precision == before


class BuildsInBfloat16(Observer):
    """Stands for another thread that builds a model, for which transformers changes the default dtype."""

    def stage(self, text: str) -> None:
        torch.set_default_dtype(torch.bfloat16)


def test_another_default_dtype_in_the_middle_changes_no_byte(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    model, config = make_model("llama", dtype=torch.bfloat16), QuantConfig(effort="best", tune_steps=2, group_size=32)
    quantize(model, tmp_path / "a", config, calibration=windows)
    try:
        quantize(model, tmp_path / "b", config, calibration=windows, observer=BuildsInBfloat16())
    finally:
        torch.set_default_dtype(torch.float32)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_a_model_in_the_making_keeps_its_dtype() -> None:
    """Runs that want float32 as the default wait until it is made, and leave the default alone if it is float32."""
    with fresh_torch_state():
        torch.set_default_dtype(torch.bfloat16)  # another thread, which does not know of this, begins a model
    assert torch.get_default_dtype() == torch.bfloat16
    torch.set_default_dtype(torch.float32)
    made: list[torch.dtype] = []

    def run() -> None:
        with fresh_torch_state():
            made.append(torch.get_default_dtype())

    with BUILDING:
        torch.set_default_dtype(torch.bfloat16)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(0.2)
        assert (made, torch.get_default_dtype()) == ([], torch.bfloat16)
        torch.set_default_dtype(torch.float32)
    thread.join()
    assert (made, torch.get_default_dtype()) == ([torch.float32], torch.float32)


def test_threads_share_one_default_dtype_and_the_last_restores_it() -> None:
    entered, may_leave, found = threading.Event(), threading.Event(), []

    def work() -> None:
        with fresh_torch_state():
            entered.set()
            may_leave.wait(20)
            found.append(torch.get_default_dtype())

    with DefaultDtype():
        thread = threading.Thread(target=work)
        with fresh_torch_state():
            thread.start()
            assert entered.wait(20)
        may_leave.set()
        thread.join()
    assert found == [torch.float32]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_packed_model_can_be_traced(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    quantize(make_model(), tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    model = load(tmp_path / "out")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return found

    with torch.no_grad():
        whole = Logits().eval()
        traced: Any = torch.jit.trace(whole, (windows,))
        torch.testing.assert_close(traced(windows.flip(0)), whole(windows.flip(0)), rtol=1e-4, atol=1e-4)


def test_a_mask_of_infinity_is_copied(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / "out"
    stored = load_file(source / "model.safetensors")
    stored["model.mask"] = torch.full((4, 4), -torch.inf).triu(1)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, out, QuantConfig(method="rtn", group_size=32))
    assert torch.equal(load_file(out / "model.safetensors")["model.mask"], stored["model.mask"])
    assert verify.verify(out).problems == []


def test_a_packed_model_becomes_dense_when_asked(make_model: MakeModel, windows: Tensor, tmp_path: Path) -> None:
    quantize(make_model("opt"), tmp_path / "out", QuantConfig(method="rtn", group_size=32, format="gptq"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        packed = model(input_ids=windows).logits
        name, stored = "model.decoder.layers.0.fc1", load_file(tmp_path / "out" / "model.safetensors")
        layer: Any = model.get_submodule(name)
        assert torch.equal(layer.qweight, stored[f"{name}.qweight"])
        dense = model.dequantize()
        assert type(dense.get_submodule(name)) is nn.Linear
        torch.testing.assert_close(dense(input_ids=windows).logits, packed, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("read", [AutoModelForCausalLM.from_pretrained, load])
def test_adapters_are_trained_on_a_packed_model(
    read: Callable[[Path], Any], make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    quantize(make_model(), tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    model = read(tmp_path / "out")
    before = model(input_ids=windows).logits.detach()
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=windows).logits.detach(), before)
    kept = adapted.get_base_model().state_dict()
    for name, tensor in stored.items():
        parent, _, own = name.rpartition(".")
        assert torch.equal(kept[name] if name in kept else kept[f"{parent}.base_layer.{own}"], tensor)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(read(tmp_path / "out"), tmp_path / "adapter")
    assert torch.equal(again(input_ids=windows).logits, adapted(input_ids=windows).logits)
