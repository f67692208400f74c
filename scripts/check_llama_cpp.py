"""Check GGUF files in llama.cpp: it loads them and computes what we do, and how its own quantizer's files compare.

    python scripts/check_llama_cpp.py [--environment DIR] [--effort balanced] [--skip-quality]

Three things are checked, each with an exit code of 1 if it fails:

- Tiny random models of every architecture that is known, in float32: the logits of llama.cpp and ours are the same, and
  both split text into the same tokens.
- The demo model in every type: logits differ by no more than the rounding of llama.cpp's activations to 8 bits.
- The demo model's perplexity, by llama.cpp's own tool on text that neither quantizer has seen, in our files and in
  those of llama-quantize at the same types, with an importance matrix of our calibration text. Embeddings have the same
  type on both sides; Q4_K_M is llama-quantize's own mixture.

llama.cpp is compiled from the source in llama-cpp-python's distribution, some ten minutes with two jobs.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gptq import QuantConfig, calibration, load, quantize
from gptq.checkpoint.reader import Source
from gptq.demo import CALIBRATION_WINDOWS, MODEL, SEQ_LEN, read_texts
from gptq.formats import gguf_file
from gptq.formats.gguf_architectures import ARCHITECTURES
from gptq.formats.gguf_tokenizer import DIGITS, GPT_2, SPACE, SPLITS
from gptq.models.hf_config import read_tokenizer

RELEASE = "0.3.36"  # of llama-cpp-python
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
CMAKE = ("-DBUILD_SHARED_LIBS=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_SERVER=OFF")
LEVEL = 1.002  # our Q4_0 is level with their mixture if its perplexity is no more than 0.2 % higher
LARGEST_FLOAT_KL = 2e-4  # between llama.cpp's logits and ours for weights in float32
LARGEST_KL = 0.005  # for packed weights; activations in 8 bits give 0.0002 to 0.001
TYPES: dict[str, tuple[dict[str, Any], str]] = {  # ours, and the embedding's type in both files
    "Q4_0": ({"format": "gguf", "bits": 4}, "q8_0"),
    "Q4_1": ({"format": "gguf", "bits": 4, "sym": False}, "q8_0"),
    "Q5_0": ({"format": "gguf", "bits": 5}, "q8_0"),
    "Q8_0": ({"format": "gguf", "bits": 8}, "q8_0"),
    "IQ4_NL": ({"format": "gguf-iq4", "bits": 4}, "q8_0"),
    "Q2_K": ({"format": "gguf-k", "bits": 2}, "q6_k"),
    "Q3_K": ({"format": "gguf-k", "bits": 3}, "q6_k"),
    "Q4_K": ({"format": "gguf-k", "bits": 4}, "q6_k"),
    "Q5_K": ({"format": "gguf-k", "bits": 5}, "q6_k"),
    "Q6_K": ({"format": "gguf-k", "bits": 6}, "q6_k"),
}
COMPARED = ("Q4_0", "IQ4_NL", "Q4_K", "Q3_K", "Q2_K")
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "head_dim": 16, "vocab_size": 4096, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 16}
OPTIONS: dict[str, dict[str, Any]] = {  # beside TINY, by model type
    "llama": {"rope_parameters": ROPE},
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True},
    "gemma2": {**GEMMA, "num_hidden_layers": 4},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
}
SAMPLES = (
    "def f(x):\n    return x  # 12345 apples, isn't it?\n\n\tÜber 3.14 \u4f60\u597d\n",
    "  two  spaces\n\n\nI'LL go",
)


@dataclass(frozen=True)
class Llama:
    """A compiled llama.cpp, and the Python that has its bindings."""

    bin: Path
    python: Path

    def run(self, tool: str, *arguments: object) -> str:
        """Run one of its tools; return what it prints."""
        command = [self.bin / tool, *map(str, arguments), *(() if tool == "llama-quantize" else ("-t", "1"))]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.bin)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{tool} failed: {(done.stdout + done.stderr)[-1000:]}")
        return done.stdout + done.stderr

    def start(self, file: Path, threads: int) -> "subprocess.Popen[str]":
        """Start a worker that loads a file in llama.cpp."""
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["LLAMA_CPP_LIB_PATH"] = str(self.bin)
        command = [str(part) for part in (self.python, worker, file, threads)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    @contextmanager
    def serve(self, file: Path) -> Iterator["Served"]:
        """Load a file in llama.cpp, on one thread."""
        with self.start(file, 1) as process:
            yield Served(process)
            if process.stdin is not None:
                process.stdin.close()


class Served:
    """A worker that has loaded a file."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def ask(self, asked: dict[str, Any]) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise TypeError("the worker has no pipes")
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            error = self._process.stderr.read() if self._process.stderr else ""
            raise RuntimeError(f"llama.cpp did not answer: {error[-1000:]}")
        return json.loads(line)


def cpu_model() -> str:
    """Return what the system calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {named[0] if named else platform.processor()}"


def compile_llama(folder: Path) -> Llama:
    """Compile llama.cpp and install its Python bindings, unless `folder` has them already."""
    found = Llama(folder / "build" / "bin", folder / "venv" / "bin" / "python")
    if (folder / "ready").exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    wanted = f"llama-cpp-python=={RELEASE}"
    subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", folder, wanted], check=True)
    archive = next(folder.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    subprocess.run(["cmake", "-S", source, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release", *CMAKE], check=True)
    subprocess.run(["cmake", "--build", folder / "build", "-j", "2", "--target", "llama", *TOOLS], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    environment = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    command = [str(found.python), "-m", "pip", "install", "--quiet", str(archive), "gguf"]
    subprocess.run(command, env=environment, check=True)
    (folder / "ready").touch()
    return found


def compare_logits(llama: Llama, folder: Path, tokens: int) -> tuple[float, bool]:
    """Return the mean KL divergence of llama.cpp's distribution from ours, and whether both tokenize alike."""
    model, tokenizer = load(folder, dtype="float32"), read_tokenizer(folder, trust_remote_code=False)
    ids = torch.randint(5, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids).logits[0].float().log_softmax(-1)
    with llama.serve(folder / gguf_file.FILE) as served, tempfile.TemporaryDirectory() as there:
        served.ask({"all_logits": ids[0].tolist(), "file": f"{there}/logits.npy"})
        theirs = torch.from_numpy(np.load(f"{there}/logits.npy")).log_softmax(-1)
        alike = all(
            served.ask({"text": text})["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in SAMPLES
        )
    return float((ours.exp() * (ours - theirs)).sum(-1).mean()), alike


def check_architectures(llama: Llama, folder: Path) -> bool:
    """Compare tiny random models of every architecture."""
    fine = True
    for kind in ARCHITECTURES:
        config = transformers.AutoConfig.for_model(kind, **{**TINY, **OPTIONS.get(kind, {}), "pad_token_id": 0})
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else parameter.data.normal_(1, 0.1)
        network.save_pretrained(folder / kind)
        transformers.PreTrainedTokenizerFast.from_pretrained(MODEL).save_pretrained(folder / kind)
        gguf_file.write_file(Source(folder / kind), folder / kind, {}, [])
        kl, alike = compare_logits(llama, folder / kind, 48)
        fine &= kl < LARGEST_FLOAT_KL and alike
        print(f"{kind:12}  KL {kl:.7f}  {'the same tokens' if alike else 'OTHER TOKENS'}", flush=True)
    return fine


def _tokenizers(text: str) -> Iterator[tuple[str, Tokenizer]]:
    """Yield a small tokenizer for each split that has a name, and one of SentencePiece's kind."""
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<unk>", "<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    for steps, name in SPLITS.items():
        bpe = Tokenizer(models.BPE(ignore_merges=True))
        parts: list[Any] = [pre_tokenizers.Digits(True)] if DIGITS in steps else []
        parts += [pre_tokenizers.Split(Regex(one), "isolated") for one in steps if one not in (DIGITS, GPT_2)]
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT_2 in steps))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
        bpe.train_from_iterator([text], trainer)
        yield name, bpe
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.normalizer = normalizer
    learned.train_from_iterator(
        text.splitlines(), trainers.BpeTrainer(vocab_size=800, special_tokens=["<unk>", "<s>"], show_progress=False)
    )
    known: dict[str, Any] = json.loads(learned.to_str())["model"]
    in_order = sorted(known["vocab"], key=known["vocab"].get)
    names = list(dict.fromkeys([*in_order[:2], *(f"<0x{byte:02X}>" for byte in range(256)), *in_order[2:]]))
    merges = [tuple(merge) for merge in known["merges"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    spm = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spm.normalizer = normalizer
    yield "SentencePiece", spm


def check_tokenizers(llama: Llama, folder: Path) -> bool:
    """Compare how texts are split, in files of a tiny model with each kind of tokenizer."""
    text, fine = read_texts()[0], True
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", **{**TINY, "vocab_size": 1200, "pad_token_id": 0})
    for name, backend in _tokenizers(text):
        own = folder / f"tokenizer-{name}"
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(own)
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
        made.save_pretrained(own)
        gguf_file.write_file(Source(own), own, {}, [])
        with llama.serve(own / gguf_file.FILE) as served:
            samples = (*SAMPLES, text[:3000])
            wrong = [
                s
                for s in samples
                if served.ask({"text": s})["tokens"] != made(s, add_special_tokens=False)["input_ids"]
            ]
        fine &= not wrong
        print(
            f"tokenizer {name:14}  {'the same tokens' if not wrong else f'OTHER TOKENS for {wrong[0][:60]!r}'}",
            flush=True,
        )
    return fine


def check_types(llama: Llama, folder: Path, effort: str, types: Collection[str]) -> bool:
    """Quantize the demo model to these types, and compare it."""
    tokenizer = read_tokenizer(MODEL, trust_remote_code=False)
    windows = calibration.draw_windows([read_texts()[0]], tokenizer, CALIBRATION_WINDOWS, SEQ_LEN, seed=0)
    fine = True
    for name in types:
        options, _ = TYPES[name]
        made = quantize(MODEL, folder / name, QuantConfig(effort=effort, **options), calibration=windows)
        kl, alike = compare_logits(llama, folder / name, 256)
        fine &= kl < LARGEST_KL and alike
        tokens = "the same tokens" if alike else "OTHER TOKENS"
        print(f"{name:6}  {made.bits_per_weight:.3f} bits  KL {kl:.5f}  {tokens}", flush=True)
    return fine


def check_quality(llama: Llama, folder: Path, types: Collection[str]) -> bool:
    """Compare perplexities with those of llama-quantize's files, for those of the types that are compared."""
    texts = {name: folder / f"{name}.txt" for name in ("calibration", "measured")}
    for file, text in zip(texts.values(), read_texts(), strict=True):
        file.write_text(text, encoding="utf-8")
    (folder / "original").mkdir()
    gguf_file.write_file(Source(MODEL), folder / "original", {}, [])
    original, matrix = folder / "original" / gguf_file.FILE, folder / "importance.gguf"
    window = ("-c", SEQ_LEN, "--chunks", CALIBRATION_WINDOWS)
    llama.run("llama-imatrix", "-m", original, "-f", texts["calibration"], "-o", matrix, *window)
    print(f"original  {_perplexity(llama, original, texts['measured'])}")
    fine = True
    for name in (*(name for name in COMPARED if name in types), *(("Q4_K_M",) if "Q4_0" in types else ())):
        kind = TYPES.get(name, (None, "q8_0"))[1]
        same = ("--token-embedding-type", kind, "--output-tensor-type", kind, *(("--pure",) if name in TYPES else ()))
        theirs = folder / f"their-{name}.gguf"
        llama.run("llama-quantize", "--imatrix", matrix, *same, original, theirs, name.replace("_K", "_K_S", 1)
                  if name in ("Q4_K", "Q3_K") else name)  # fmt: skip
        own = folder / ("Q4_0" if name == "Q4_K_M" else name) / gguf_file.FILE
        found = {file: _perplexity(llama, file, texts["measured"]) for file in (own, theirs)}
        fine &= found[own] < found[theirs] * (LEVEL if name == "Q4_K_M" else 1)
        sizes = {file: file.stat().st_size / 1e6 for file in found}
        which = f"{own.parent.name} against {name}"
        print(
            f"{which:22}  ours {found[own]:.3f} ({sizes[own]:.2f} MB)  llama-quantize {found[theirs]:.3f} "
            f"({sizes[theirs]:.2f} MB)",
            flush=True,
        )
    return fine


def _perplexity(llama: Llama, file: Path, text: Path) -> float:
    """Perplexity by llama.cpp's tool, of the second half of each window."""
    printed = llama.run("llama-perplexity", "-m", file, "-f", text, "-c", SEQ_LEN, "--chunks", 64)
    found = re.findall(r"\[\d+\]([\d.]+),", printed)  # after each window, of all windows so far
    if not found:
        raise RuntimeError(f"llama-perplexity printed no perplexity: {printed[-500:]}")
    return float(found[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / f"llama-cpp-{RELEASE}")
    parser.add_argument("--effort", default="balanced", help="of our quantization")
    parser.add_argument("--types", nargs="+", choices=tuple(TYPES), default=tuple(TYPES), help="types to check")
    parser.add_argument("--skip-architectures", action="store_true")
    parser.add_argument("--skip-quality", action="store_true", help="only load files and compare logits")
    args = parser.parse_args()
    llama = compile_llama(args.environment)
    print(f"llama-cpp-python {RELEASE}, {cpu_model()}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        fine = args.skip_architectures or check_architectures(llama, folder)
        fine &= args.skip_architectures or check_tokenizers(llama, folder)
        fine &= check_types(llama, folder, args.effort, args.types)
        fine &= args.skip_quality or check_quality(llama, folder, args.types)
    print("all as expected" if fine else "NOT as expected")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
