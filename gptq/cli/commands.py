"""The commands: each calls the library with its arguments, prints results to stdout and progress to stderr."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import torch
import transformers

from gptq.checkpoint import hub
from gptq.cli.early import polished_folder, read_config, read_polish_config
from gptq.cli.eval_command import run_eval
from gptq.cli.interrupts import noticing_interrupts
from gptq.cli.plan_command import run_plan
from gptq.cli.printing import format_bytes, print_engines, print_json
from gptq.cli.progress import Progress
from gptq.compute.distributed import current_ranks, process_group
from gptq.errors import InputError, printable
from gptq.evaluation import report
from gptq.models.hf_config import choose_device
from gptq.output import verify
from gptq.output.convert import convert
from gptq.pipeline.quantize import Result
from gptq.pipeline.run import Observer
from gptq.planning import memory
from gptq.polishing.polish import polish
from gptq.polishing.quantize import quantize

BAD_INPUT, UNEXPECTED, PIPE_CLOSED = 2, 3, 141  # exit codes; the last is that of shells, 128 and a signal's number
MOST_PROBLEMS = 20  # lines of `verify`; a damaged file of a large model makes thousands
PACKAGE = Path(__file__).parents[1]
NO_MEMORY = ("allocate memory", "could not create a primitive", "can't start new thread")  # torch, oneDNN, Python


def run(args: argparse.Namespace) -> int:
    """Run `args.command`; returns the exit code."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    with noticing_interrupts() as interrupts:
        try:
            code = COMMANDS[args.command](args)
            if sys.stdout is not None:  # as it is where the output is closed
                sys.stdout.flush()  # here, where it is seen that nobody reads
            return code
        except (Exception, KeyboardInterrupt) as error:
            if interrupts or isinstance(error, KeyboardInterrupt):
                print(f"gptq: interrupted; {_describe_leftovers(error)}", file=sys.stderr)
                return 128 + (interrupts or [signal.SIGINT])[0]  # as in a shell
            if sys.flags.dev_mode:
                raise
            return _explain(error)


def _explain(error: Exception) -> int:
    """Print an error in a sentence; return the exit code. `python -X dev -m gptq` shows a traceback instead."""
    if isinstance(error, BrokenPipeError):  # who read our output is gone; without this Python fails again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    if isinstance(error, InputError):
        print(f"gptq: {error}", file=sys.stderr)
        return BAD_INPUT
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in NO_MEMORY):
        first = printable((str(error) or type(error).__name__).splitlines()[0])
        needs_less = "fewer --samples or a smaller --batch-size need less"
        print(f"gptq: out of memory ({first}); {needs_less}; {_describe_leftovers(error)}", file=sys.stderr)
        return BAD_INPUT
    if isinstance(error, OSError):
        print(printable(f"gptq: {error.filename or 'the system'}: {error.strerror or error}"), file=sys.stderr)
        return BAD_INPUT
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else "gptq"
    said = " ".join(str(error).split())[:300]
    print(
        printable(
            f"gptq: {type(error).__name__} in {where}: {said}; this is a fault of gptq or of a library, please report "
            f"it (`python -X dev -m gptq ...` shows where it arose); {_describe_leftovers(error)}"
        ),
        file=sys.stderr,
    )
    return UNEXPECTED


def _describe_leftovers(error: BaseException) -> str:
    """Say what is left for a later run, from the notes on an error."""
    return "; ".join(getattr(error, "__notes__", [])) or "nothing half-written was left behind"


def _quantize(args: argparse.Namespace) -> int:
    config = read_config(args)
    if args.push:
        hub.check_access(args.push)
    with process_group(args.device), Progress() as progress:
        first = current_ranks(choose_device(args.device)).rank == 0
        result = quantize(
            args.model,
            args.out,
            config,
            calibration=args.calibration,
            device=args.device,
            dtype=args.dtype,
            batch_size=args.batch_size,
            memory_limit=args.memory_limit,
            gpu_memory_limit=args.gpu_memory_limit,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
            also=getattr(args, "also", ()),
            observer=progress if first else Observer(),
        )
    if not first:
        return 0
    if args.json:
        print_json({**result.to_dict(), "peak_rss_bytes": memory.peak_resident_bytes()})
    else:
        _print_summary(result)
    return _push(args)


def _push(args: argparse.Namespace) -> int:
    if args.push:
        address = hub.push(Path(args.out), args.push, private=args.private)
        print(f"pushed to {address}", file=sys.stderr)
    return 0


def _convert(args: argparse.Namespace) -> int:
    if args.push:
        hub.check_access(args.push)
    with Progress() as progress:
        made = convert(
            args.model,
            args.out,
            args.format,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            progress=progress.layer_written,
        )
    for note in made.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    if args.json:
        print_json(made.to_dict())
    else:
        sizes = f"{format_bytes(made.bytes_before)} -> {format_bytes(made.bytes_after)}"
        print(f"{made.out}: {made.layers} layers as {made.format}, {sizes}, not requantized")
    return _push(args)


def _polish(args: argparse.Namespace) -> int:
    with Progress() as progress:
        made = polish(
            args.model,
            args.against,
            polished_folder(args),
            read_polish_config(args),
            calibration=args.calibration,
            device=args.device,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
            observer=progress,
        )
    if args.json:
        print_json(made.to_dict())
    else:
        print(
            f"{made.out}: KL(original || quantized) on held-out windows {made.kl_before:.5f} -> {made.kl_after:.5f} "
            f"per token, after {made.steps} steps, {made.seconds:.0f} s"
        )
    return 0


def _print_summary(result: Result) -> None:
    print(
        f"{result.out}: {len(result.layers)} layers at {result.bits_per_weight:.2f} bits per weight ({result.format}), "
        f"{format_bytes(result.bytes_before)} -> {format_bytes(result.bytes_after)}, "
        f"{result.seconds:.0f} s, {format_bytes(memory.peak_resident_bytes())} peak memory"
    )
    for folder in result.also:
        print(f"{folder}: the same integers")
    worst = max(result.layers, key=lambda layer: layer.error)
    if worst.damp is None:
        print(f"largest relative weight error {worst.error:.2%} ({worst.name})")
    else:
        kept = sum(layer.error for layer in result.layers) / max(sum(layer.rtn_error for layer in result.layers), 1e-30)
        print(f"layer errors are {kept:.0%} of round-to-nearest's; the largest is {worst.error:.2%} ({worst.name})")


def _inspect(args: argparse.Namespace) -> int:
    content = verify.inspect(args.out)
    if args.json:
        print_json(content.to_dict())
        return 0
    width = max(len(layer.name) for layer in content.layers)
    print(f"{'layer':{width}}  bits  group  outputs x inputs      bytes  error   rtn")
    for layer in content.layers:
        shape = f"{layer.outputs} x {layer.inputs}"
        grid = f"{layer.bits:4}  {layer.group_size:5}"
        errors = f"{layer.error:6.2%} {layer.rtn_error:6.2%}" if layer.error is not None else "     -      -"
        scattered = "" if layer.ordered_groups else "  g_idx"
        print(f"{layer.name:{width}}  {grid}  {shape:>16}  {layer.nbytes:9}  {errors}{scattered}")
    quantized, others = format_bytes(content.quantized_bytes), format_bytes(content.other_bytes)
    print(
        f"{len(content.layers)} layers, {quantized}, {content.bits_per_weight:.2f} bits per weight; "
        f"{len(content.other_tensors)} other tensors, {others}; {content.format}"
    )
    print_engines(content.engines)
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = verify.verify(args.out, trust_remote_code=args.trust_remote_code)
    if args.json:
        print_json(found.to_dict())
    else:
        for problem in found.problems[:MOST_PROBLEMS]:
            print(printable(problem))
        if more := len(found.problems[MOST_PROBLEMS:]):
            print(f"... and {more:,} more; --json has all of them")
        for note in found.notes:
            print(f"note: {printable(note)}")
        for engine, what in found.checked.items():
            print(f"{engine:13} {what}")
        fine = "as it was written" if found.recorded else "consistent; there is no record to compare it with"
        verdict = f"{len(found.problems)} differences" if found.problems else fine
        print(f"{args.out}: {found.layers} layers, {found.tensors} tensors, {found.files} other files: {verdict}")
    return 1 if found.problems else 0


def _report(args: argparse.Namespace) -> int:
    page, pictures = report.write_report(args.out, args.to)
    if args.json:
        print_json({"page": str(page), "pictures": [str(picture) for picture in pictures]})
    else:
        print(page, *pictures, sep="\n")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from gptq import demo  # imports the 465 kB of text that it calibrates on

    with Progress() as progress:
        shown = demo.run(progress)
    if args.json:
        print_json(shown.to_dict())
        return 0
    print("bits  method         size  bits/weight  perplexity  above original")
    for row in shown.rows:
        above = f"{row.above_original:+.1%}" if row.method != "original" else ""
        print(
            f"{row.bits:4}  {row.method:8}  {format_bytes(row.bytes):>9}  {row.bits_per_weight:11.2f}  "
            f"{row.perplexity:10.3f}  {above:>14}"
        )
    print(f"\nThe 4-bit GPTQ model continues {shown.prompt.splitlines()[-1]!r}:\n{' '.join(shown.generated.split())}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "quantize": _quantize,
    "plan": run_plan,
    "convert": _convert,
    "polish": _polish,
    "eval": run_eval,
    "inspect": _inspect,
    "verify": _verify,
    "report": _report,
    "demo": _demo,
}
