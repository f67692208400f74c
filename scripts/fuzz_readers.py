"""Fuzz everything that reads a checkpoint with damaged and hostile files; print each violation once.

    python scripts/fuzz_readers.py --minutes 5 --seed 1 --fixtures FOLDER_OF_CHECKPOINTS

The script makes small valid checkpoints of every format, changes one file of one of them (bytes, JSON values, tensor
headers, the kind of file), and runs one command on it. The command must end within 30 seconds and 2 GiB of additional
address space, with exit code 0 or 1, or with 2 and one sentence. It must print no control characters, open no file
outside the folder, and leave no incomplete result. A violation is printed once for each place in the code, with the
change that caused it, and the script then exits with 1.
"""

import argparse
import contextlib
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gptq import InputError, QuantConfig, cli, load, quantize
from gptq.formats.gguf_file import explain_missing

GGUF_HEADER = 16_000  # bytes of the small file that are changed: its keys, and its tensors' entries
ADDITIONAL_BYTES, SECONDS = 2 * 2**30, 30  # limits of a command: address space beyond the current one, and time
TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds. " * 40
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "format": "gptq"},
    "gptq_v2": {"bits": 3, "format": "gptq_v2", "sym": False},
    "pack": {"bits": 5, "format": "pack-quantized", "sym": False},
    "mixed": {"bits": 4, "format": "gptq", "overrides": [["down_proj", {"bits": 8}], ["o_proj", {"skip": True}]]},
    "wide": {"bits": 4, "format": "gptq", "group_size": 32, "overrides": [["down_proj", {"skip": True}]]},
    "gguf": {"bits": 4, "format": "gguf", "group_size": 32, "overrides": [["down_proj", {"skip": True}]]},
    "nvfp4": {"format": "nvfp4-pack-quantized"},
    "mxfp4": {"format": "mxfp4-pack-quantized", "group_size": 32, "overrides": [["down_proj", {"skip": True}]]},
    "fp8": {"format": "fp8", "group_size": 128},
    "mlx": {"bits": 4, "group_size": 32, "format": "mlx", "sym": False, "overrides": [["down_proj", {"skip": True}]]},
    "int8": {"bits": 8, "group_size": -1, "format": "int-quantized"},
    "mixed-pack": {"bits": 4, "format": "pack-quantized", "overrides": [["down_proj", {"bits": 8, "group_size": 16}]]},
}


# --- what is changed --------------------------------------------------------------------------------------------------


def make_checkpoints(folder: Path, fixtures: Path | None = None) -> dict[str, Path]:
    """Make small valid checkpoints: unquantized (single file, sharded, with experts), one per format, and fixtures."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    found = {}
    for name, kind, options, shard in (
        ("plain", "llama", {}, "5GB"),
        ("shards", "llama", {"tie_word_embeddings": True}, "30KB"),
        ("experts", "mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}, "5GB"),
    ):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **small, **options, bos_token_id=0, eos_token_id=0)
        found[name] = folder / name
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found[name], max_shard_size=shard)
        _tokenizer().save_pretrained(found[name])
    for name, recipe in RECIPES.items():
        if "gguf" in recipe["format"] and explain_missing():
            continue
        found[name] = folder / name
        quantize(found["plain"], found[name], QuantConfig.from_dict({"method": "rtn", "group_size": 16, **recipe}))
        measured = {"perplexity": 300.5, "original_perplexity": 290.1, "data": "a.txt", "windows": 3, "seq_len": 16,
                    "kl": 0.1, "intervals": {"kl": [0.05, 0.2]}}  # fmt: skip
        (found[name] / "quality.json").write_text(json.dumps({"measurements": [measured]}))
    found["quantized-experts"] = folder / "quantized-experts"
    quantize(found["experts"], found["quantized-experts"], QuantConfig(method="rtn", group_size=16))
    found["stacked-experts"] = folder / "stacked-experts"
    skipped = [["down_proj", {"skip": True}]]
    stacked = {"method": "rtn", "group_size": 32, "format": "mlx", "overrides": skipped}
    quantize(found["experts"], found["stacked-experts"], QuantConfig.from_dict(stacked))
    for path in sorted(fixtures.iterdir()) if fixtures else []:
        if (path / "config.json").is_file():
            found[f"fixture {path.name}"] = path
    return found


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


NUMBERS = [0, -1, -2, 1, 2, 3, 5, 7, 16, 1000, 2**31, 2**63, 2**64, 10**12, 10**40, -(10**18), 0.5, 1e-320, 1e308,
           math.nan, math.inf, -math.inf]  # fmt: skip
TEXTS = ["", "4", "gptq", "gptq_v2", "pack-quantized", "compressed-tensors", "mlx", "affine",
         "../x", "/etc/passwd", "a\nb\x1b[31mred",
         "\u202eabc", "\ud800", "<script>alert(1)</script>", "$\\frac{", "(a|aa)+$", "(x+x+)+y", "(a{900}){900}", "[",
         "re:(.*.*)*z", "-:.*", "Linear", "float16", "torch.load", "x" * 5000]  # fmt: skip
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=5,
)
DTYPES = ["F32", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "I1024", 5, None]
RAW = [b"", b"{", b"null", b"[]", b"{}", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"[" * 100_000,
       b'{"a":' * 900 + b"1",
       b'{"bits": ' + b"9" * 5000 + b"}", b'{"a": NaN, "a": 2}', b"\x00" * 64]  # fmt: skip
KINDS = ["folder", "pipe", "link outside", "link to a device", "link to itself", "gone", "link to nothing"]


@dataclass(frozen=True)
class Change:
    """A change to one file of one checkpoint, and the command to run on the result."""

    checkpoint: str
    file: str
    how: str
    what: Any
    command: str


@st.composite
def changes(draw: st.DrawFn, checkpoints: dict[str, Path]) -> Change:
    """Strategy for changes to an existing file, or to calibration data (`data.npz`, `data.txt`, `data.jsonl`)."""
    name = draw(st.sampled_from(sorted(checkpoints)))
    command = draw(st.sampled_from([*COMMANDS, "verify", "load", "inspect"]))
    if command in ("calibrate", "measure"):
        files = sorted(DATA) if command == "calibrate" else ["data.txt", "data.jsonl"]
    else:
        files = sorted(
            p.name for p in checkpoints[name].iterdir() if p.suffix in (".json", ".safetensors", ".gguf", ".md")
        )
        often = ("config.json", "model.safetensors", "model.gguf", "tensor_index.json", "quantization_record.json")
        files += [f for f in files if f in often] * 2
    file = draw(st.sampled_from(files))
    hows = ["bytes", "cut", "kind"]
    if file.endswith(".json"):
        hows = ["value"] * 6 + ["bytes", "cut", "kind", "raw"]
    elif file.endswith(".safetensors"):
        hows = ["header"] * 6 + ["length", "bytes", "cut", "kind"]
    elif file.endswith(".gguf"):
        hows = ["field"] * 6 + ["bytes", "cut", "kind"]
    how = draw(st.sampled_from(hows))
    return Change(name, file, how, draw(PAYLOADS[how]), command)


# A relative position in a file, list or object. The multiplication scatters it: hypothesis prefers small numbers.
where = st.integers(0, 9999).map(lambda number: number * 6173 % 10_000 / 10_000)
PAYLOADS: dict[str, st.SearchStrategy[Any]] = {
    "bytes": st.lists(st.tuples(where, st.integers(0, 255), st.booleans()), min_size=1, max_size=4),
    "cut": where,
    "kind": st.sampled_from(KINDS),
    "raw": st.sampled_from(RAW),
    "value": st.tuples(
        st.lists(where, min_size=1, max_size=5), st.sampled_from(["set", "drop", "rename", "number"]), values),
    "header": st.tuples(where, st.sampled_from(["dtype", "shape", "data_offsets", "rename", "drop", "copy"]), where,
                        st.sampled_from(DTYPES), st.sampled_from(NUMBERS), st.sampled_from(TEXTS)),
    "field": st.tuples(where, st.sampled_from([4, 8]), st.sampled_from(
        [0, 1, 2, 5, 8, 9, 31, 255, 2**20, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])),
    "length": st.sampled_from([0, 1, 7, 2**20, 10**8, 2**31, 2**63 - 1, 2**64 - 1]),
}  # fmt: skip


def apply(change: Change, folder: Path, outside: Path) -> None:
    """Apply a change to its file in `folder`."""
    file = folder / change.file
    if change.how == "kind":
        _change_kind(file, change.what, outside)
        return
    content = bytearray(file.read_bytes())
    if change.how == "bytes":
        for at, byte, insert in change.what:
            # Half of the changes affect the first 400 bytes, where headers are.
            i = int(at * len(content)) if byte % 2 else int(at * min(len(content), 400))
            content[i : i + (not insert)] = bytes([byte])
    elif change.how == "cut":
        del content[int(change.what * len(content)) :]
    elif change.how == "raw":
        content = bytearray(change.what)
    elif change.how == "value":
        tree = json.loads(content)
        _change_value(tree, *change.what)
        content = bytearray(json.dumps(tree).encode())
    elif change.how == "field":  # a count, a length, a type or an offset of a binary header
        at, size, number = change.what
        i = int(at * min(len(content), GGUF_HEADER))
        content[i : i + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    elif change.how == "length":
        content[:8] = change.what.to_bytes(8, "little")
    else:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        _change_header(header, *change.what)
        text = json.dumps(header).encode()
        content = bytearray(len(text).to_bytes(8, "little") + text + content[8 + size :])
    file.write_bytes(content)


def _change_kind(file: Path, kind: str, outside: Path) -> None:
    """Replace a file by a folder, pipe or link, or remove it."""
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "gone":
        targets: dict[str, str | Path] = {
            "link outside": outside,
            "link to a device": "/dev/zero",
            "link to itself": file.name,
        }
        file.symlink_to(targets.get(kind, "nothing-here"))


def _change_value(tree: Any, path: list[float], how: str, value: Any) -> None:
    """Change a value deep in a JSON tree; each part of `path` selects a child by its relative position."""
    parent: Any = None
    key: Any = None
    for part in path:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
        if not keys:
            break
        key = keys[int(part * len(keys))]
        parent, tree = tree, tree[key]
    if parent is None:
        return
    if how == "drop":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[str(value)] = parent.pop(key)
    elif how == "number" and type(tree) in (int, float):
        parent[key] = NUMBERS[int(path[0] * len(NUMBERS))]
    else:
        parent[key] = value


def _change_header(
    header: dict[str, Any], at: float, how: str, place: float, dtype: Any, number: Any, text: str
) -> None:
    """Change one tensor's entry in a safetensors header."""
    names = [name for name in header if name != "__metadata__"]
    name = names[int(at * len(names))]
    entry = header[name]
    if how == "dtype":
        entry["dtype"] = dtype
    elif how in ("shape", "data_offsets"):
        numbers = entry[how]
        if numbers and place < 0.8:
            numbers[int(place * len(numbers))] = number
        else:
            numbers.append(number)
    elif how == "drop":
        del header[name]
    else:
        header[text if place < 0.5 else f"{name}{text}"] = entry if how == "copy" else header.pop(name)


# --- what is run ------------------------------------------------------------------------------------------------------


def _data(folder: Path) -> None:
    np.savez(folder / "data.npz", input_ids=np.ones((4, 16), np.int64), attention_mask=np.ones((4, 16), np.int64))
    (folder / "data.txt").write_text(TEXT)
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": TEXT[:600]}) + "\n" for _ in range(4)))


DATA = ("data.jsonl", "data.npz", "data.txt")
WINDOWS = ["--seq-len", "16", "--device", "cpu"]
COMMANDS: dict[str, Callable[[Path, Path, str], list[str]]] = {
    "load": lambda model, out, data: [],
    "plan": lambda model, out, data: ["plan", str(model), "--group-size", "16", "--override", "up_proj:bits=8"],
    "quantize": lambda model, out, data: ["quantize", str(model), str(out), "--method", "rtn", "--group-size", "16"],
    "calibrate": lambda model, out, data: [
        "quantize", str(model), str(out), "--group-size", "16", "--samples", "2", "--effort", "fast", *WINDOWS,
        "--calibration", data],
    "walk": lambda model, out, data: [
        "quantize", str(model), str(out), "--group-size", "16", "--samples", "2", "--effort", "balanced", *WINDOWS,
        "--calibration", data],
    "inspect": lambda model, out, data: ["inspect", str(model)],
    "verify": lambda model, out, data: ["verify", str(model)],
    "to gptq_v2": lambda model, out, data: ["convert", str(model), str(out), "--format", "gptq_v2"],
    "to pack": lambda model, out, data: ["convert", str(model), str(out), "--format", "pack-quantized"],
    "to gptq": lambda model, out, data: ["convert", str(model), str(out), "--format", "gptq"],
    "to gguf": lambda model, out, data: ["convert", str(model), str(out), "--format", "gguf"],
    "report": lambda model, out, data: ["report", str(model)],
    "eval": lambda model, out, data: ["eval", str(model), "--data", data, "--windows", "1", *WINDOWS],
    "measure": lambda model, out, data: [
        "eval", str(model), "--data", data, "--windows", "1", "--card", "--save", *WINDOWS],
}  # fmt: skip
opened: list[str] = []  # paths that Python opened while a command ran


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and arguments and isinstance(arguments[0], str | bytes):
        opened.append(os.fsdecode(arguments[0]))


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Inside, the address space may grow by ADDITIONAL_BYTES, and after SECONDS a TimeoutError is raised."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} seconds")

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDITIONAL_BYTES, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def broken_law(change: Change, checkpoint: Path) -> str | None:
    """Run a change; return a description of the violation with its place in the code, or None."""
    with tempfile.TemporaryDirectory() as place:
        folder, out, outside = Path(place) / "model", Path(place) / "out", Path(place) / "elsewhere.json"
        shutil.copytree(checkpoint, folder)
        holder = folder if change.file in DATA else Path(place)  # folder of the data; changes apply only to `folder`
        _data(holder)
        outside.write_text('{"bits": 4, "secret": 1}')
        apply(change, folder, outside)
        data = next(
            (folder if change.file in DATA else Path(place)).glob(change.file if change.file in DATA else "*.txt"), None
        )
        arguments = COMMANDS[change.command](folder, out, str(data))
        printed = io.StringIO()
        opened.clear()
        try:
            with (
                limited(),
                warnings.catch_warnings(),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
            ):
                warnings.simplefilter("ignore")
                code = cli.main(arguments) if arguments else _load(folder)
        except BaseException as error:  # any exception that leaves a command is a violation
            if isinstance(error, KeyboardInterrupt):
                raise
            return _place(error)
        said = printed.getvalue()
        if str(outside) in opened:
            return f"{change.command}: a file outside the folder was opened"
        if code != 0 and (out.exists() or list(Path(place).glob("out*"))):
            return f"{change.command}: something half-written was left"
        return _complaint(change, code, said)


def _load(folder: Path) -> int:
    """`gptq.load` with the exit code of a command."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        load(folder, device="cpu")
    except InputError as error:
        print(f"gptq: {error}")
        return 2
    return 0


def _complaint(change: Change, code: int, said: str) -> str | None:
    """Check the exit code and the output of a command; return the violation, if any."""
    sentences = [line for line in said.splitlines() if line.startswith("gptq: ")]
    if code == 2 and len(sentences) != 1:
        return f"{change.command}: {len(sentences)} sentences: {said[-300:]!r}"
    if code not in (0, 1, 2):
        return f"{change.command}: exit code {code}"
    if "Traceback" in said:
        return f"{change.command}: a traceback was printed"
    if any(not c.isprintable() and c != "\n" for c in said):
        return f"{change.command}: control characters were printed: {said[-300:]!r}"
    if any(
        word in said for word in ("out of memory", "allocate memory", "MemoryError", "TimeoutError", "more than 30 sec")
    ):
        return f"{change.command}: a huge allocation or a hang: {said[-300:]!r}"
    return None


def _place(error: BaseException) -> str:
    """The exception, and the innermost line of the package that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}gptq{os.sep}" in frame.filename] or list(frames)
    last, own_last = frames[-1], own[-1]
    where_ = f"{Path(own_last.filename).name}:{own_last.lineno} {own_last.name}"
    return f"{type(error).__name__} at {where_} (raised in {Path(last.filename).name} {last.name}): {str(error)[:200]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--fixtures", type=Path, metavar="FOLDER", help="of further small checkpoints, of other tools say"
    )
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(1)
    sys.addaudithook(_watch)
    found: dict[str, Change] = {}
    count = 0
    with tempfile.TemporaryDirectory() as place:
        checkpoints = make_checkpoints(Path(place), args.fixtures)
        number = args.seed * 1_000_000

        def attempt(change: Change) -> None:
            nonlocal count
            if time.monotonic() > until:
                return
            count += 1
            broken = broken_law(change, checkpoints[change.checkpoint])
            if broken and broken.partition("): ")[0] not in found:
                found[broken.partition("): ")[0]] = change
                print(f"FOUND {broken}\n      {change!r:.600}", flush=True)

        while time.monotonic() < until:
            number += 1
            campaign = settings(
                max_examples=200, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            seed(number)(campaign(given(changes(checkpoints))(attempt)))()
    print(f"{count} changes, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
