"""Shared by quality_table.py: quantize a model with another tool, on given tokens, and read the file it writes.

Each tool runs in a virtual environment and a process of its own, in float32, from a plain safetensors folder. What
comes out is read by this package (`gptq.formats.original`) into a plain checkpoint, which is measured as every other
model is. With a check, the logits that the tool computes from its own file are compared with those of that checkpoint.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from check_llama_cpp import RELEASE, Llama, compile_llama
from peer_environment import PACKAGES, make_environment
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptq import QuantConfig, load
from gptq.checkpoint.assembled import INDEX_FILE, AssembledSource, TensorIndex
from gptq.checkpoint.reader import Source
from gptq.formats import gguf_file
from gptq.formats.original import open_original

BEGIN = """
import json, os, sys, time
os.cpu_count = lambda: max(16, len(os.sched_getaffinity(0)))  # GPTQModel's thread pool fails on machines with few cores
import torch
from importlib.metadata import version
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokens, out, options = *sys.argv[1:4], json.loads(sys.argv[4])
bits, group_size, sym, seed = (options[key] for key in ("bits", "group_size", "sym", "seed"))
torch.manual_seed(seed)
given = load_file(tokens)
ids = given["input_ids"]
def load_plain():
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
"""
START = """
begun = time.perf_counter(), time.process_time()
"""
TELL = """
took = time.perf_counter() - begun[0], time.process_time() - begun[1]
written = str(next(Path(out).rglob("*.safetensors")).parent)  # AutoRound makes a folder named after the scheme inside
if "check" in given:
    with torch.no_grad():
        save_file({"logits": own_logits(given["check"]).float().contiguous()}, out + ".logits")
print("MEASURED", json.dumps({"seconds": took[0], "cpu_seconds": took[1], "tool": version(package)}))
"""
CODE = {  # imports, what is timed, and the logits of the finished file as the tool computes them
    "llm-compressor": (
        """
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
package = "llmcompressor"
""",
        """
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
loaded = load_plain()
weights = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=group_size, symmetric=sym,
                           observer="mse")
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder="static")
oneshot(model=loaded, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
        shuffle_calibration_samples=False)
loaded.save_pretrained(out, save_compressed=True)
""",
        """
def own_logits(windows):
    return AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)(windows).logits
""",
    ),
    "gptqmodel": (
        """
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
package = "gptqmodel"
""",
        """
loaded = GPTQModel.load(model, QuantizeConfig(bits=bits, group_size=group_size, sym=sym), device="cpu",
                        dtype=torch.float32, backend=BACKEND.TORCH)
loaded.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
loaded.save(out)
""",
        """
def own_logits(windows):
    read = GPTQModel.load(written, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH)  # not in float32
    return read.model(input_ids=windows).logits
""",
    ),
    "auto-round": (
        """
from auto_round import AutoRound
package = "auto-round"
""",
        """
data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
rounder = AutoRound(load_plain(), AutoTokenizer.from_pretrained(model), bits=bits, group_size=group_size, sym=sym,
                    iters=options["iters"], dataset=data, seqlen=ids.shape[1], nsamples=len(ids), device_map="cpu",
                    seed=seed, enable_torch_compile=False)  # compiling takes longer than a small model's rounding
rounder.quantize_and_save(out, format="auto_round")
""",
        """
def own_logits(windows):
    read = AutoModelForCausalLM.from_pretrained(written, device_map="cpu", dtype=torch.float32)
    return read(windows).logits
""",
    ),
}
LLAMA_CPP = "llama.cpp"
MIXTURES = {4: "Q4_K_M", 3: "Q3_K_M", 2: "Q2_K"}  # what llama-quantize makes of most models, by width
PURE = {4: "Q4_K_S", 3: "Q3_K_S", 2: "Q2_K"}  # with one type in all layers
# Largest KL between a tool's own logits and ours of its file: llama.cpp rounds activations to 8 bits, GPTQModel
# computes in float16, AutoRound rounds weights to 16 bits.
LARGEST_READING = {LLAMA_CPP: 0.005, "gptqmodel": 0.0005, "auto-round": 0.0005}
EXACT_READING = 1e-6


@dataclass(frozen=True)
class Peer:
    """A tool with the options that make a row of the table."""

    tool: str
    sym: bool = True
    iters: int = 0  # AutoRound's steps per block
    types: tuple[tuple[int, str], ...] = ()  # llama-quantize's names, by width
    pure: bool = False

    def config(self, bits: int, group_size: int, **options: Any) -> QuantConfig:
        """What the row is filed under; llama.cpp's types have the groups that they have."""
        own = {"format": "gguf-k"} if self.types else {"group_size": group_size, "sym": self.sym}
        return QuantConfig(bits=bits, **own, **options)


PEERS = {
    "llm-compressor": Peer("llm-compressor", sym=False),  # asymmetric, "mse" observer, static act-order
    "llm-compressor-sym": Peer("llm-compressor"),
    "gptqmodel": Peer("gptqmodel"),  # its defaults: symmetric, activation-aware groups
    "auto-round": Peer("auto-round", iters=200),
    "auto-round-1000": Peer("auto-round", iters=1000),
    "llama.cpp": Peer(LLAMA_CPP, types=tuple(MIXTURES.items())),
    "llama.cpp-pure": Peer(LLAMA_CPP, types=tuple(PURE.items()), pure=True),
}


@dataclass(frozen=True)
class Made:
    """A model that a tool quantized, read back into a plain checkpoint."""

    folder: Path
    bits_per_weight: float  # every stored bit of the packed layers
    nbytes: int  # of the file's tensors
    facts: dict[str, Any]  # seconds, cpu_seconds, tool (its version), and reading where it was checked


def make(
    name: str, config: QuantConfig, folder: Path, windows: Tensor, check: Tensor | None, work: Path, environments: Path
) -> Made:
    """Quantize `folder` with a peer.

    Args:
        name: a key of PEERS.
        windows: calibration tokens (windows, tokens).
        check: tokens (windows, tokens) on which the tool's own logits are compared with those of our reading.
        work: an empty folder.
        environments: where the tools' environments are, or are made.

    Raises:
        RuntimeError: the tool failed, or its own logits are others than those of its file as we read it.
    """
    peer = PEERS[name]
    out = work / "out"
    if peer.tool == LLAMA_CPP:
        facts = _run_llama_cpp(peer, config, folder, windows, check, out, environments / LLAMA_CPP)
        source: Source = AssembledSource(out)
    else:
        facts = _run_tool(peer, config, folder, windows, check, out, environments / peer.tool)
        _say_float32(out / "config.json")
        source = open_original(out)
    bits_per_weight, nbytes = _write_plain(source, folder, work / "plain")
    if check is not None:
        theirs = load_file(f"{out}.logits")["logits"].double().log_softmax(-1)
        with torch.no_grad():
            ours = load(work / "plain", dtype="float32", device="cpu")(input_ids=check).logits.double().log_softmax(-1)
        facts["reading"] = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
        if not facts["reading"] < LARGEST_READING.get(peer.tool, EXACT_READING):
            raise RuntimeError(f"{name}: KL between its own logits and ours of its file is {facts['reading']:.2g}")
    return Made(work / "plain", bits_per_weight, nbytes, facts)


def _run_tool(
    peer: Peer, config: QuantConfig, folder: Path, windows: Tensor, check: Tensor | None, out: Path, environment: Path
) -> dict[str, Any]:
    python = make_environment(environment, PACKAGES[peer.tool])
    tokens = out.with_name("tokens.safetensors")
    save_file({"input_ids": windows, **({} if check is None else {"check": check})}, tokens)
    imports, timed, logits = CODE[peer.tool]
    options = {**{key: getattr(config, key) for key in ("bits", "group_size", "sym", "seed")}, "iters": peer.iters}
    command = [python, "-c", BEGIN + imports + START + timed + logits + TELL, str(folder), str(tokens), str(out)]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, json.dumps(options)], env=own, capture_output=True, text=True, cwd=out.parent)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{peer.tool} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    made = next(out.rglob("*.safetensors")).parent
    if made != out:
        made.rename(out.with_name("inner"))
        shutil.rmtree(out)
        out.with_name("inner").rename(out)
    facts: dict[str, Any] = json.loads(lines[0].removeprefix("MEASURED "))
    return facts


def _say_float32(file: Path) -> None:
    """Have the weights decoded without rounding them to the dtype that a config names."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("torch_dtype", None)
    file.write_text(json.dumps({**values, "dtype": "float32"}), encoding="utf-8")


def _write_plain(source: Source, original: Path, out: Path) -> tuple[float, int]:
    """Write a checkpoint's values in float32; return bits per weight of its packed layers, and its files' bytes."""
    shutil.copytree(original, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    _say_float32(out / "config.json")
    tensors, packed, weights = {}, 0, 0
    for name in source.tensors:
        tensors[name] = source.read(name, torch.float32).contiguous()
        nbytes = _stored_bytes(source, name)
        if tensors[name].ndim == 2 and nbytes < 1.9 * tensors[name].numel():  # float16 has 2 bytes
            packed, weights = packed + nbytes, weights + tensors[name].numel()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return 8 * packed / weights, source.file_bytes


def _stored_bytes(source: Source, name: str) -> int:
    if not isinstance(source, AssembledSource):
        return source.stored_bytes(name)
    begin, end = source.byte_range(name)
    return end - begin


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _run_llama_cpp(
    peer: Peer, config: QuantConfig, folder: Path, windows: Tensor, check: Tensor | None, out: Path, environment: Path
) -> dict[str, Any]:
    """Quantize with llama-quantize and an importance matrix of the windows; embeddings stay as they are."""
    llama = compile_llama(environment)
    whole = out.with_name("whole")
    whole.mkdir()
    index = gguf_file.write_file(Source(folder), whole, {}, [])
    started, cpu = time.perf_counter(), os.times()
    matrix = out.with_name("importance.gguf")
    write_importance(folder, windows, index, matrix)
    out.mkdir()
    dtype = str(Source(folder).tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    kind = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
    options = ["--token-embedding-type", kind, "--output-tensor-type", kind, *(["--pure"] if peer.pure else [])]
    files = (whole / gguf_file.FILE, out / gguf_file.FILE)
    llama.run("llama-quantize", "--imatrix", matrix, *options, *files, dict(peer.types)[config.bits], 1)
    seconds, spent = time.perf_counter() - started, [b - a for a, b in zip(cpu, os.times(), strict=True)]
    as_floats = {name: place.model_copy(update={"dtype": "F32"}) for name, place in index.tensors.items()}
    told = TensorIndex(files=index.files, tensors=as_floats).model_dump_json(exclude_none=True)
    (out / INDEX_FILE).write_text(told, encoding="utf-8")
    if check is not None:
        save_file({"logits": _llama_logits(llama, out / gguf_file.FILE, check)}, f"{out}.logits")
    return {"seconds": seconds, "cpu_seconds": sum(spent[:4]), "tool": f"llama-cpp-python {RELEASE}"}


def _llama_logits(llama: Llama, file: Path, windows: Tensor) -> Tensor:
    with llama.serve(file) as served, tempfile.TemporaryDirectory() as there:
        found = []
        for window in windows:
            served.ask({"all_logits": window.tolist(), "file": f"{there}/logits.npy"})
            found.append(torch.from_numpy(np.load(f"{there}/logits.npy")))
    return torch.stack(found)


def write_importance(folder: Path, windows: Tensor, index: TensorIndex, file: Path) -> None:
    """Write an importance matrix as llama-imatrix does: of each layer the sum over all tokens of each input's square.

    llama-imatrix takes text, not tokens, so that it would see other windows. Its file (tools/imatrix/imatrix.cpp) has
    for each weight NAME `NAME.in_sum2` (1, inputs) and `NAME.counts` (1, 1), the number of windows' tokens summed.
    """
    from gguf import GGUFWriter

    network = load(folder, dtype="float32", device="cpu")
    sums = {}

    def add_to(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total.add_(inputs[0].double().square().flatten(0, -2).sum(0))

        return add

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in index.tensors and not name.endswith("lm_head"):
            sums[f"{name}.weight"] = torch.zeros(module.in_features, dtype=torch.float64)
            module.register_forward_pre_hook(add_to(sums[f"{name}.weight"]))
    with torch.no_grad():
        for window in windows:
            network(input_ids=window[None], use_cache=False)
    writer = GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration windows"])
    writer.add_uint32("imatrix.chunk_count", len(windows))
    writer.add_uint32("imatrix.chunk_size", windows.shape[1])
    counts = np.full((1, 1), windows.numel(), dtype=np.float32)
    for name, total in sums.items():
        stored = index.tensors[name].tensor
        writer.add_tensor(f"{stored}.in_sum2", total[None].float().numpy())
        writer.add_tensor(f"{stored}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
