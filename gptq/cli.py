"""The command line: arguments -> engine, evaluate, verify or demo; results to stdout, progress to stderr."""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
import transformers
from tqdm import tqdm

from gptq import evaluate, verify
from gptq.config import Method, QuantConfig
from gptq.engine import Observer, Result, quantize
from gptq.errors import InputError
from gptq.record import LayerResult
from gptq.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 `verify` found a difference, 2 bad input or interrupted."""
    args = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
    try:
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except InputError as error:
        print(f"gptq: {error}", file=sys.stderr)
    except BrokenPipeError:  # what read our output has gone; Python would complain once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"gptq: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
    except (torch.OutOfMemoryError, MemoryError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        print(f"gptq: out of memory ({first}); fewer --samples or a smaller --batch-size need less", file=sys.stderr)
    except KeyboardInterrupt:
        print("gptq: interrupted; nothing half-written was left behind", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gptq", description="Quantize Hugging Face checkpoints with GPTQ.")
    parser.add_argument("--version", action="version", version=f"gptq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    source_help = (
        "a .txt, .jsonl or .parquet file (column `text`), a folder that datasets loads (FOLDER:SPLIT), "
        "or a Hub data set (wikitext:wikitext-2-raw-v1:test)"
    )

    p = commands.add_parser("quantize", help="quantize a checkpoint", formatter_class=_Help)
    p.add_argument("model", metavar="MODEL", help="folder or Hub id of a safetensors checkpoint")
    p.add_argument("out", metavar="OUT", help="folder to make; must not exist or be empty")
    p.add_argument("--bits", type=int, default=4, metavar="N", help="2, 3, 4 or 8")
    p.add_argument("--group-size", type=int, default=128, metavar="N", help="inputs per scale; -1: one per row")
    p.add_argument("--asym", action="store_true", help="give every group a zero point of its own")
    p.add_argument("--desc-act", action="store_true", help="quantize inputs with large activations first (act-order)")
    p.add_argument(
        "--dynamic-groups",
        action="store_true",
        help="fit scales as columns are reached; with --desc-act this needs g_idx",
    )
    p.add_argument("--method", choices=("gptq", "rtn"), default="gptq", help="rtn: round to nearest, no calibration")
    p.add_argument("--calibration", default="c4", metavar="SRC", help=source_help)
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows")
    p.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens per window")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of windows")
    p.add_argument(
        "--damp-percent", type=float, default=0.01, metavar="X", help="fraction of the Hessian's mean diagonal"
    )
    p.add_argument(
        "--batch-size", type=int, metavar="N",
        help="calibration windows in mid-block at once: fewer than all saves memory and repeats forwards; same bytes",
    )  # fmt: skip
    _add_common(p)
    p.set_defaults(command=_quantize)

    p = commands.add_parser("eval", help="measure perplexity", formatter_class=_Help)
    p.add_argument("model", metavar="MODEL", help="folder or Hub id, quantized or not")
    p.add_argument("--data", required=True, metavar="SRC", help=source_help)
    p.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens per window")
    p.add_argument("--windows", type=int, metavar="N", help="measure only the first N windows")
    _add_common(p)
    p.set_defaults(command=_eval)

    for name, does, command in (
        ("inspect", "what a quantized checkpoint holds, layer by layer", _inspect),
        ("verify", "reopen, unpack, and compare with what was recorded when it was written", _verify),
    ):
        p = commands.add_parser(name, help=does)
        p.add_argument("out", metavar="OUT", type=Path, help="folder of a quantized checkpoint")
        p.add_argument("--json", action="store_true", help="one JSON object to stdout")
        p.set_defaults(command=command)

    p = commands.add_parser("demo", help="quantize and measure the small model that ships with the package")
    p.add_argument("--json", action="store_true", help="one JSON object to stdout")
    p.set_defaults(command=_demo)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.required
        return action.help if silent else super()._get_help_string(action)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    parser.add_argument("--dtype", default="auto", help="of forward passes: float32, bfloat16, float16")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object to stdout")


# --- the commands -----------------------------------------------------------------------------------------------------


def _quantize(args: argparse.Namespace) -> int:
    method: Method = args.method
    config = QuantConfig(
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asym,
        desc_act=args.desc_act,
        static_groups=not args.dynamic_groups,
        method=method,
        damp_percent=args.damp_percent,
        num_samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
    )
    with Progress() as progress:
        result = quantize(
            args.model,
            args.out,
            config,
            calibration=args.calibration,
            device=args.device,
            dtype=args.dtype,
            batch_size=args.batch_size,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            observer=progress,
        )
    if args.json:
        _print_json({**result.to_dict(), "peak_rss_bytes": _peak_rss()})
    else:
        _print_summary(result)
    return 0


def _print_summary(result: Result) -> None:
    print(
        f"{result.out}: {len(result.layers)} layers at {result.bits_per_weight:.2f} bits per weight, "
        f"{_megabytes(result.bytes_before)} -> {_megabytes(result.bytes_after)}, "
        f"{result.seconds:.0f} s, {_megabytes(_peak_rss())} peak memory"
    )
    worst = max(result.layers, key=lambda layer: layer.error)
    if worst.damp is None:
        print(f"largest relative weight error {worst.error:.2%} ({worst.name})")
    else:
        kept = sum(layer.error for layer in result.layers) / max(sum(layer.rtn_error for layer in result.layers), 1e-30)
        print(f"layer errors are {kept:.0%} of round-to-nearest's; the largest is {worst.error:.2%} ({worst.name})")


def _eval(args: argparse.Namespace) -> int:
    with Progress() as progress:
        found = evaluate.perplexity(
            args.model,
            args.data,
            seq_len=args.seq_len,
            windows=args.windows,
            device=args.device,
            dtype=args.dtype,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            progress=progress.window_done,
        )
    if found.seq_len != args.seq_len:
        print(
            f"note: windows are {found.seq_len} tokens, the model's limit, instead of {args.seq_len}", file=sys.stderr
        )
    if args.json:
        _print_json(vars(found))
    else:
        print(
            f"perplexity {found.perplexity:.4f} over {found.tokens} tokens, {found.windows} windows of {found.seq_len}"
        )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    content = verify.inspect(args.out)
    if args.json:
        _print_json(content.to_dict())
        return 0
    width = max(len(layer.name) for layer in content.layers)
    print(f"{'layer':{width}}  bits  group  outputs x inputs      bytes  error   rtn")
    for layer in content.layers:
        shape = f"{layer.outputs} x {layer.inputs}"
        grid = f"{layer.bits:4}  {layer.group_size:5}"
        errors = f"{layer.error:6.2%} {layer.rtn_error:6.2%}" if layer.error is not None else "     -      -"
        scattered = "" if layer.ordered_groups else "  g_idx"
        print(f"{layer.name:{width}}  {grid}  {shape:>16}  {layer.nbytes:9}  {errors}{scattered}")
    quantized, others = _megabytes(content.quantized_bytes), _megabytes(content.other_bytes)
    print(
        f"{len(content.layers)} layers, {quantized}, {content.bits_per_weight:.2f} bits per weight; "
        f"{len(content.other_tensors)} tensors kept as they were, {others}"
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = verify.verify(args.out)
    if args.json:
        _print_json(found.to_dict())
    else:
        for problem in found.problems:
            print(problem)
        verdict = f"{len(found.problems)} differences" if found.problems else "as it was written"
        print(f"{args.out}: {found.layers} layers, {found.tensors} tensors, {found.files} other files: {verdict}")
    return 1 if found.problems else 0


def _demo(args: argparse.Namespace) -> int:
    from gptq import demo  # reads the standard library's 465 kB of topics

    with Progress() as progress:
        shown = demo.run(progress)
    if args.json:
        _print_json(shown.to_dict())
        return 0
    print("bits  method         size  bits/weight  perplexity  above original")
    for row in shown.rows:
        above = f"{row.above_original:+.1%}" if row.method != "original" else ""
        print(
            f"{row.bits:4}  {row.method:8}  {_megabytes(row.bytes):>9}  {row.bits_per_weight:11.2f}  "
            f"{row.perplexity:10.3f}  {above:>14}"
        )
    print(f"\nThe 4-bit GPTQ model continues {shown.prompt.splitlines()[-1]!r}:\n{' '.join(shown.generated.split())}")
    return 0


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _peak_rss() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's memory in where the process was forked from a large one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes elsewhere


class Progress(Observer):
    """A bar with the time left on a terminal; elsewhere a line per block, and one per tenth of the windows."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._began = time.monotonic()
        self._blocks = self._weights = self._done = 0
        self._block = -1

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.finished()

    def note(self, text: str) -> None:
        tqdm.write(f"note: {text}", file=sys.stderr)

    def stage(self, text: str) -> None:
        if self._bar:
            self._bar.set_description(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def started(self, num_blocks: int, weights: int) -> None:
        self._blocks, self._weights, self._began = num_blocks, weights, time.monotonic()
        self._done, self._block = 0, -1
        self._open_bar(weights)

    def layer_done(self, block: int, layer: LayerResult, weights: int) -> None:
        self._done += weights
        if self._bar is not None:
            self._bar.set_description(f"block {block + 1}/{self._blocks} {layer.name.rpartition('.')[2]}")
            self._bar.update(weights)
        elif block != self._block:
            self._line(f"block {block + 1} of {self._blocks}", self._done / self._weights)
            self._block = block

    def window_done(self, done: int, total: int) -> None:
        if done == 1:
            self._began = time.monotonic()
            self._open_bar(total)
        if self._bar is not None:
            self._bar.set_description(f"window {done}/{total}")
            self._bar.update(1)
        elif done == total or done * 10 // total != (done - 1) * 10 // total:
            self._line(f"window {done} of {total}", done / total)

    def finished(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open_bar(self, total: int) -> None:
        if sys.stderr.isatty():
            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=total, bar_format=form, dynamic_ncols=True, file=sys.stderr)

    def _line(self, text: str, fraction: float) -> None:
        elapsed = time.monotonic() - self._began
        left = elapsed * (1 - fraction) / fraction
        print(f"{text}, {elapsed:.0f} s, about {left:.0f} s left", file=sys.stderr, flush=True)
