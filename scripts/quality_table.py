"""Make a table of quality against size: method x bits x group size, over several calibration seeds.

    python scripts/quality_table.py                                                    # the model in the package
    python scripts/quality_table.py ./llama --calibration c4 --data wikitext:wikitext-2-raw-v1:test --json llama.json
    python scripts/quality_table.py --methods rtn "plain GPTQ" --bits 3 --group-sizes 32 128
    python scripts/quality_table.py --methods balanced best --peers llm-compressor auto-round gptqmodel llama.cpp

Each method is run with several seeds, which choose the calibration windows, and measured on text that is not used for
calibration:

    bits/weight   every stored bit of the quantized layers: codes, scales, zero points, g_idx
    KL            KL(original || quantized) per token in nats, mean over seeds, with its 95 % bootstrap interval over
                  windows (the interval covers the choice of the text), and the lowest and the highest over single
                  seeds (the spread covers the choice of the calibration windows)
    x plain       KL relative to that of plain GPTQ at the same bits and group size
    x peer        KL relative to the lowest of another tool at the same bits and group size (llama.cpp has its own
                  groups, and is compared with in the lines that have these)
    perplexity    exp of the mean loss over seeds; gap: its increase over the original's
    top-1         fraction of tokens for which both models have the same most likely token
    seconds       of quantization, mean over seeds; CPU s: of all threads

Other tools (`--peers`) get the same tokens, each in an environment of its own below --environments, made on first use.
Their files are read by this package and measured as ours are; see quality_peers.py. Tools that refuse groups which do
not divide a layer's inputs take a model with `--pad-inner`. Each result is saved to the JSON file at once; a second run
computes only what is missing. A peer that fails is told of at once, and named below the table.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from quality_peers import PEERS, make
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from gptq import QuantConfig, __version__, calibration, demo, quantize
from gptq.checkpoint.hub import resolve
from gptq.config import FORMATS
from gptq.errors import InputError
from gptq.evaluation import evaluate
from gptq.inference.load import load
from gptq.models.hf_config import fit_seq_len, read_config, read_tokenizer

# Options of QuantConfig by method. Options that matter are explicit, so that a changed default does not change them.
PLAIN = "plain GPTQ"
NO_LEVERS: dict[str, Any] = {"sym": True, "search": False, "desc_act": False, "sweeps": 0, "two_streams": False}
PRESETS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "sym": True},
    PLAIN: NO_LEVERS,
    "plain GPTQ, dynamic groups": {**NO_LEVERS, "static_groups": False},
    "GPTQ act-order": {**NO_LEVERS, "desc_act": True},
    "GPTQ act-order + MSE grid": {**NO_LEVERS, "desc_act": True, "search": True},
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
    "max": {"effort": "max"},
    "balanced, asym": {"effort": "balanced", "sym": False},
    "best, asym": {"effort": "best", "sym": False},
    "max, asym": {"effort": "max", "sym": False},
    "balanced, damping 0.05": {"effort": "balanced", "damp_percent": 0.05},
}
MIXED: dict[str, dict[str, Any]] = {  # widths and groups by layer, in the stored bits of a GPTQ file of one width
    f"{method}, mixed": PRESETS[method] | {"mixed": True}
    for method in ("balanced", "best", "max", "balanced, asym", "max, asym")
}

Row = dict[str, Any]  # one quantized model: "method", "config" and the measurements


def configurations(args: argparse.Namespace) -> list[tuple[str, QuantConfig]]:
    """All rows of the table with all seeds; round-to-nearest uses no calibration, so it has one seed."""
    found = []
    for bits in args.bits:
        for group_size in args.group_sizes:
            common = {"num_samples": args.samples, "seq_len": args.seq_len}
            for name in args.peers:
                seeds = range(args.seeds)
                found += [(name, PEERS[name].config(bits, group_size, seed=seed, **common)) for seed in seeds]
            for method in args.methods:
                options = {"bits": bits, "group_size": group_size, **common, **(PRESETS | MIXED)[method]}
                options |= {"format": args.format, "overrides": tuple(args.override)}
                seeds = range(1 if options.get("method") == "rtn" else args.seeds)
                found += [(method, QuantConfig(**options, seed=seed)) for seed in seeds]
    return list(dict.fromkeys(found))  # llama.cpp's lines are the same for all group sizes


class Table:
    """The rows measured so far, in a JSON file that is replaced atomically."""

    def __init__(self, path: Path, setting: Row) -> None:
        self.path, self.setting = path, setting
        self.rows: list[Row] = []
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in setting if content["setting"].get(key) != setting[key]]
            if differing:
                raise InputError(
                    f"{path} was measured with {differing[0]} {content['setting'].get(differing[0])!r}, not "
                    f"{setting[differing[0]]!r}; name another file with --json"
                )
            self.rows = content["rows"]

    def row(self, method: str, config: QuantConfig) -> Row | None:
        """The row of a configuration; None if it was not measured, or was measured with other options."""
        key = {"method": method, "config": config.to_dict()}
        return next((row for row in self.rows if {name: row[name] for name in key} == key), None)

    def add(self, row: Row) -> None:
        """Add a row and save the file."""
        self.rows.append(row)
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps({"setting": self.setting, "rows": self.rows}), encoding="utf-8")
        partial.replace(self.path)


def read_texts(args: argparse.Namespace) -> tuple[Sequence[str], Sequence[str]]:
    """Read the rows of text for calibration and for measurement."""
    first, second = demo.read_texts() if args.model == "demo" else ("", "")
    if args.model != "demo" and not args.data:
        raise InputError("a model of your own needs --data, the text to measure on")
    calibrating = (
        [first] if first and not args.calibration else calibration.documents(args.calibration or "c4", "train")
    )
    return calibrating, calibration.documents(args.data, "test") if args.data else [second]


def pad_inner(folder: Path, multiple: int, out: Path) -> Path:
    """Write a model of Llama's kind with its MLPs' inner width padded to a multiple; it computes the same.

    The inner channels that are added are zero: silu(0) * 0 = 0, and their columns of down_proj are zero.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = values["intermediate_size"]
    added = -width % multiple
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensors[name] = torch.nn.functional.pad(tensor, (0, 0, 0, added))
        elif name.endswith("down_proj.weight"):
            tensors[name] = torch.nn.functional.pad(tensor, (0, added))
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    (out / "config.json").write_text(json.dumps({**values, "intermediate_size": width + added}), encoding="utf-8")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def measure(
    method: str, config: QuantConfig, folder: Path, calibrating: Tensor, measured: Tensor, args: argparse.Namespace
) -> Row:
    """Quantize with one configuration, measure the result, and return its row."""
    with tempfile.TemporaryDirectory(prefix="gptq-table-") as scratch:
        out = Path(scratch) / "out"
        options = {"device": args.device, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
        if method in PEERS:
            check = measured[:1] if args.check_reading else None
            made = make(method, config, folder, calibrating, check, Path(scratch), args.environments)
            out, bits, nbytes, facts = made.folder, made.bits_per_weight, made.nbytes, made.facts
        else:
            cpu = time.process_time()
            own = quantize(folder, out, config, calibration=calibrating, **options)
            bits, nbytes = own.bits_per_weight, own.bytes_after
            facts = {"seconds": own.seconds, "cpu_seconds": time.process_time() - cpu, "tool": __version__}
        numbers = evaluate.measure_windows(load(out, **options), folder, measured, args.dtype, args.trust_remote_code)
    found = evaluate.summarize(numbers, measured.shape[1])
    return {
        "method": method,
        "config": config.to_dict(),
        "bits_per_weight": bits,
        "bytes": nbytes,
        **facts,
        **found.to_dict(),
        "per_window": numbers.tolist(),  # (windows, 4); the table's intervals resample these
    }


def markdown(table: Table, wanted: Iterable[tuple[str, QuantConfig]]) -> str:
    """The table in Markdown: a line per method, bits and group size, over all seeds measured so far."""
    by_line: dict[tuple[int, int, str], list[Row]] = {}
    for method, config in wanted:
        row = table.row(method, config)
        if row:
            by_line.setdefault((config.bits, config.group_size, method), []).append(row)
    found = {line: _over_seeds(rows) for line, rows in by_line.items()}
    seq_len = table.setting["seq_len"]
    original = next(iter(found.values())).original_perplexity if found else float("nan")
    lines = [
        f"{table.setting['model']}: original perplexity {original:.3f} over {table.setting['windows']} windows of "
        f"{seq_len}; {table.setting['samples']} calibration windows of {seq_len}",
        "",
        "| bits | group | method | bits/weight | KL | seeds' KL | x plain | x peer | perplexity | gap | top-1 | "
        "seconds | CPU s | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (bits, group_size, method), rows in by_line.items():
        mean = found[bits, group_size, method]
        each = [row["kl"] for row in rows]
        spread = f"{min(each):.4f} to {max(each):.4f}" if len(each) > 1 else ""
        plain = found.get((bits, group_size, PLAIN))
        peers = [one.kl for (b, g, name), one in found.items() if (b, g) == (bits, group_size) and name in PEERS]
        low, high = mean.intervals["kl"] if mean.intervals else (mean.kl, mean.kl)
        cells = [
            bits, group_size, method, f"{_mean(rows, 'bits_per_weight'):.3f}", f"{mean.kl:.4f} [{low:.4f}, {high:.4f}]",
            spread, f"{mean.kl / plain.kl:.2f}" if plain else "", f"{mean.kl / min(peers):.2f}" if peers else "",
            f"{mean.perplexity:.3f}", f"{mean.gap:+.2%}", f"{mean.top1_agreement:.2%}",
            f"{_mean(rows, 'seconds'):.1f}", f"{_mean(rows, 'cpu_seconds'):.1f}", len(rows),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    tools = {row["method"]: row["tool"] for rows in by_line.values() for row in rows if row["method"] in PEERS}
    lines += ["", *(f"{method}: version {version}" for method, version in tools.items())] if tools else []
    return "\n".join(lines)


def _mean(rows: list[Row], key: str) -> float:
    return statistics.mean(float(row.get(key, "nan")) for row in rows)


def _over_seeds(rows: list[Row]) -> evaluate.Comparison:
    per_seed = torch.tensor([row["per_window"] for row in rows], dtype=torch.float64)  # (seeds, windows, 4)
    return evaluate.summarize(per_seed.mean(0), rows[0]["seq_len"])


def run(args: argparse.Namespace) -> None:
    """Measure all rows that are missing, and print the table."""
    folder = demo.MODEL if args.model == "demo" else resolve(args.model, None)
    with tempfile.TemporaryDirectory(prefix="gptq-padded-") as scratch:
        if args.pad_inner > 1:
            folder = pad_inner(folder, args.pad_inner, Path(scratch) / "model")
        _fill(folder, args)


def _fill(folder: Path, args: argparse.Namespace) -> None:
    seq_len, _ = fit_seq_len(args.seq_len, read_config(folder, args.trust_remote_code))
    tokenizer = read_tokenizer(folder, args.trust_remote_code)
    rows, measured_rows = read_texts(args)
    measured = calibration.evaluation_windows(measured_rows, tokenizer, seq_len, args.windows)
    setting = {
        "model": args.model, "calibration": args.calibration, "data": args.data, "samples": args.samples,
        "seq_len": seq_len, "windows": len(measured), "dtype": args.dtype, "pad_inner": args.pad_inner,
        "version": __version__,
    }  # fmt: skip
    table, wanted = Table(args.json, setting), configurations(args)
    missing = [(method, config) for method, config in wanted if table.row(method, config) is None]
    failed = []
    with tqdm(missing, unit="model", disable=None) as bar:
        for method, config in bar:
            bar.set_description(f"{config.bits} bits, group {config.group_size}, {method}, seed {config.seed}")
            calibrating = calibration.draw_windows(rows, tokenizer, args.samples, seq_len, config.seed)
            try:
                table.add(measure(method, config, folder, calibrating, measured, args))
            except RuntimeError as error:
                if method not in PEERS:
                    raise
                what = f"{method}, {config.bits} bits, group {config.group_size}, seed {config.seed}"
                print(f"{what} failed: {error}", file=sys.stderr, flush=True)
                failed.append(f"{what}: failed")
    print("\n".join([markdown(table, wanted), "", *failed]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="folder or Hub id; default: demo")
    parser.add_argument(
        "--methods", nargs="*", choices=[*PRESETS, *MIXED], default=list(PRESETS), help="default: all but mixed widths"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[], help="other tools; default: none")
    there = Path(tempfile.gettempdir()) / "gptq-peers"
    parser.add_argument("--environments", type=Path, default=there, metavar="FOLDER", help="of peers; %(default)s")
    parser.add_argument("--check-reading", action="store_true", help="compare peers' own logits with ours")
    parser.add_argument("--pad-inner", type=int, default=1, metavar="N", help="pad MLPs with zeros to a multiple of N")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2], metavar="N", help="default: 4 3 2")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[128], metavar="N", help="default: 128")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="of the file, and so the grid")
    parser.add_argument("--override", action="append", default=[], metavar="RE:OPTS", help="as for `gptq quantize`")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="calibration seeds 0 to N - 1; default: 3")
    parser.add_argument("--calibration", metavar="SRC", help="as for `gptq quantize`; default: the demo's text, or c4")
    parser.add_argument("--data", metavar="SRC", help="text to measure on; default: the demo's")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows; default: 128")
    parser.add_argument("--seq-len", type=int, default=2048, metavar="N", help="default: 2048, or the model's limit")
    parser.add_argument("--windows", type=int, metavar="N", help="measure only the first N windows")
    parser.add_argument("--json", type=Path, default=Path("quality_table.json"), metavar="FILE", help="%(default)s")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    try:
        run(args)
    except InputError as error:
        print(f"quality_table.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
