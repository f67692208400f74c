"""The commands: each calls the library with its arguments, prints results to stdout and progress to stderr."""

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from gptq.calibration.arrays import Inputs
from gptq.calibration.windows import is_held_out, read_calibration
from gptq.checkpoint import hub
from gptq.cli.early import polished_folder, read_config, read_polish_config
from gptq.cli.interrupts import noticing_interrupts
from gptq.cli.progress import Progress
from gptq.compute.distributed import current_ranks, process_group
from gptq.config import QuantConfig
from gptq.errors import InputError, printable
from gptq.evaluation import evaluate, report
from gptq.evaluation.quality import Measurement, add_measurement, read_measurements
from gptq.formats import compatibility
from gptq.models.hf_config import choose_device, choose_dtype, fit_seq_len
from gptq.output import verify
from gptq.output.convert import convert
from gptq.output.record import PerplexityRecord, public_name, read_record
from gptq.pipeline.quantize import Result
from gptq.pipeline.run import Observer
from gptq.pipeline.search import MIN_WINDOWS
from gptq.planning import cost, memory
from gptq.planning.device_models import DEVICE_MODELS
from gptq.planning.plan import Plan, plan_checkpoint, refuse_other_grids
from gptq.planning.shares import count_shares
from gptq.polishing.polish import polish
from gptq.polishing.quantize import quantize

BAD_INPUT, UNEXPECTED, PIPE_CLOSED = 2, 3, 141  # exit codes; the last is that of shells, 128 and a signal's number
PACKAGE = Path(__file__).parents[1]
CHOSEN_LATER = (
    "the run measures what width and group size each layer needs; layers, engines and seconds are said here for one "
    "width for all, without that"
)
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
        _print_json({**result.to_dict(), "peak_rss_bytes": memory.peak_resident_bytes()})
    else:
        _print_summary(result)
    return _push(args)


def _push(args: argparse.Namespace) -> int:
    if args.push:
        address = hub.push(Path(args.out), args.push, private=args.private)
        print(f"pushed to {address}", file=sys.stderr)
    return 0


def _plan(args: argparse.Namespace) -> int:
    config = read_config(args)
    sample = _sample(args, config)
    plan = plan_checkpoint(
        args.model, config, args.revision, args.trust_remote_code, sample, allow_pickle=args.allow_pickle
    )
    refuse_other_grids(plan, getattr(args, "also", ()))
    found = compatibility.engines(plan.stored_layers, plan.hf_config.model_type)
    layers = list(plan.layers.values())
    divided = _divide(args, config, plan) if args.ranks is not None else {}
    needs = _estimate_needs(args, config, plan)
    notes = [*plan.notes, *([CHOSEN_LATER] if config.chooses_widths else [])]
    if args.json:
        _print_json(
            {
                "kept_share": plan.kept_share,
                "format": layers[0].format,
                "bits_per_weight": plan.bits_per_weight,
                "tensor_bytes": sum(info.nbytes for info in plan.tensors.values()),
                "layers": [layer.to_dict() for layer in layers],
                "engines": [vars(engine) for engine in found],
                "notes": notes,
                "file_bytes": plan.file_bytes,
                **needs,
                **({"ranks": divided} if divided else {}),
            }
        )
        return 0
    width = max(len(layer.name) for layer in layers)
    print(f"{100 * plan.kept_share:.1f} % of the parameters stay unquantized")
    print(f"{'layer':{width}}  bits  group   sym  outputs x inputs")
    for layer in layers:
        shape = f"{layer.outputs} x {layer.inputs}"
        print(f"{layer.name:{width}}  {layer.bits:4}  {layer.group_size:5}  {_yes_or_no(layer.sym)}  {shape:>16}")
    total = _format_bytes(sum(info.nbytes for info in plan.tensors.values()))
    print(f"{len(layers)} layers at {plan.bits_per_weight:.2f} bits per weight, {total} in all, as {layers[0].format}")
    print(needs["memory"])
    print(
        f"about {needs['seconds']:,.0f} s: {needs['operations'] / 1e12:,.2f} Tflop, and this machine was measured "
        f"to do {needs['rate'] / 1e9:,.0f} G a second in float32"
    )
    if divided:
        _print_divided(divided)
    for note in notes:
        print(f"note: {note}")
    _print_engines(found)
    return 0


def _sample(args: argparse.Namespace, config: QuantConfig) -> Inputs | None:
    """Return the inputs of one window, if the calibration data is there and may be other than text."""
    if not Path(args.calibration).exists():
        return None
    one = replace(config, num_samples=1)
    return read_calibration(args.calibration, one, args.model, args.revision, args.trust_remote_code).sample


def _estimate_needs(args: argparse.Namespace, config: QuantConfig, plan: Plan) -> dict[str, Any]:
    """Estimate memory and time of a run, the time from measuring this machine for a few seconds."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, plan.hf_config, device)
    tokens = _size_of_calibration(config, plan)
    choice, says = memory.decide_memory(
        plan, config, tokens, device, dtype, args.batch_size, args.memory_limit, args.gpu_memory_limit
    )
    work, rates = cost.count_work(plan, config, tokens), cost.measure_rates(config, device, dtype)
    return {
        "memory": says,
        "peak_bytes": choice.peak,
        "in_flight": choice.in_flight,
        "activations_in_files": choice.on_disk,
        "wide_hessians_in_files": choice.wide_on_disk,
        "seconds": work.seconds(rates),
        "operations": work.total,
        "rate": rates.solver,
    }


def _size_of_calibration(config: QuantConfig, plan: Plan) -> memory.Tokens:
    windows = MIN_WINDOWS if config.num_samples == "auto" else config.num_samples
    length, _ = fit_seq_len(config.seq_len, plan.hf_config, plan.network)
    return memory.Tokens(windows, length, sum(is_held_out(i, windows) for i in range(windows)))


def _divide(args: argparse.Namespace, config: QuantConfig, plan: Plan) -> dict[str, Any]:
    """Count what each of --ranks processes does on a device of --device-model.

    Raises:
        InputError: there are fewer windows than processes, or none.
    """
    tokens, device = _size_of_calibration(config, plan), DEVICE_MODELS[args.device_model]
    if not 0 < args.ranks <= tokens.windows:
        raise InputError(f"{tokens.windows} calibration windows cannot be shared by {args.ranks} processes")
    found = count_shares(plan, config, tokens, args.ranks, torch.bfloat16)
    return {
        "count": args.ranks,
        "device_model": args.device_model,
        "peak_bytes": found.peak,
        "device_bytes": device.memory,
        "received_bytes": found.received,
        "read_bytes": found.read,
        "seconds": found.seconds(device),
        "seconds_standing_still": found.standing_still(device),
    }


def _print_divided(found: dict[str, Any]) -> None:
    received, seconds = found["received_bytes"], found["seconds"]
    print(
        f"each of {found['count']} processes, by arithmetic for {found['device_model']} (not measured): "
        f"{_format_bytes(found['peak_bytes'])} of {_format_bytes(found['device_bytes'])} of memory, reads "
        f"{_format_bytes(found['read_bytes'])}, receives {_format_bytes(sum(received.values()))} ("
        + ", ".join(f"{kind} {_format_bytes(nbytes)}" for kind, nbytes in received.items())
        + f"), works {sum(seconds.values()):,.0f} s ("
        + ", ".join(f"{stage} {spent:,.0f}" for stage, spent in seconds.items())
        + f"), of which {found['seconds_standing_still']:,.0f} s would not be less with more processes"
    )


def _yes_or_no(value: bool) -> str:
    return " yes" if value else "  no"


def _print_engines(found: list[compatibility.Engine]) -> None:
    for engine in found:
        print(f"{engine.name:13} {'yes' if engine.takes else 'no':3}  {engine.why}".replace("`", ""))


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
        _print_json(made.to_dict())
    else:
        sizes = f"{_format_bytes(made.bytes_before)} -> {_format_bytes(made.bytes_after)}"
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
        _print_json(made.to_dict())
    else:
        print(
            f"{made.out}: KL(original || quantized) on held-out windows {made.kl_before:.5f} -> {made.kl_after:.5f} "
            f"per token, after {made.steps} steps, {made.seconds:.0f} s"
        )
    return 0


def _print_summary(result: Result) -> None:
    print(
        f"{result.out}: {len(result.layers)} layers at {result.bits_per_weight:.2f} bits per weight ({result.format}), "
        f"{_format_bytes(result.bytes_before)} -> {_format_bytes(result.bytes_after)}, "
        f"{result.seconds:.0f} s, {_format_bytes(memory.peak_resident_bytes())} peak memory"
    )
    for folder in result.also:
        print(f"{folder}: the same integers")
    worst = max(result.layers, key=lambda layer: layer.error)
    if worst.damp is None:
        print(f"largest relative weight error {worst.error:.2%} ({worst.name})")
    else:
        kept = sum(layer.error for layer in result.layers) / max(sum(layer.rtn_error for layer in result.layers), 1e-30)
        print(f"layer errors are {kept:.0%} of round-to-nearest's; the largest is {worst.error:.2%} ({worst.name})")


def _eval(args: argparse.Namespace) -> int:
    folder = Path(args.model)
    if args.save:  # fail before the work, not after it
        if not folder.is_dir():
            raise InputError(f"--save writes beside the model, and {args.model} is not a folder")
        read_measurements(folder)
    if args.card:
        read_record(Path(args.model))  # fail before the work here too
    with Progress() as progress:
        measure = partial(evaluate.compare, original=args.against) if args.against else evaluate.perplexity
        found = measure(
            args.model,
            data=args.data,
            seq_len=args.seq_len,
            windows=args.windows,
            device=args.device,
            dtype=args.dtype,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
            progress=progress.step_done if args.against else progress.window_done,
        )
    if found.seq_len != args.seq_len:
        print(
            f"note: windows are {found.seq_len} tokens, the model's limit, instead of {args.seq_len}", file=sys.stderr
        )
    if args.save:
        add_measurement(
            folder,
            Measurement(
                data=printable(args.data), original=args.against and printable(args.against), **_to_json_values(found)
            ),
        )
    if args.card:
        verify.record_perplexity(args.model, PerplexityRecord(data=public_name(args.data), **_to_json_values(found)))
    if args.json:
        _print_json(found.to_dict())
        return 0
    text = f"{found.tokens} tokens, {found.windows} windows of {found.seq_len}"
    if isinstance(found, evaluate.Comparison):
        _print_comparison(found, text)
    else:
        print(f"perplexity {found.perplexity:.4f} over {text}")
    return 0


def _to_json_values(found: evaluate.Perplexity) -> dict[str, Any]:
    """Turn a measurement into values that JSON can hold."""
    numbers = found.to_dict()
    if numbers.get("intervals"):
        numbers["intervals"] = {name: list(ends) for name, ends in numbers["intervals"].items()}
    return numbers


def _print_comparison(found: evaluate.Comparison, text: str) -> None:
    print(f"over {text}\n{'':35}95 % interval")
    for name, label, form in (
        ("perplexity", "perplexity", ".4f"),
        ("original_perplexity", "original's perplexity", ".4f"),
        ("gap", "above the original", "+.2%"),
        ("kl", "KL per token, nats", ".5f"),
        ("top1_agreement", "top-1 agreement", ".2%"),
    ):
        ends = "" if found.intervals is None else " to ".join(f"{end:{form}}" for end in found.intervals[name])
        print(f"{label:22}{format(getattr(found, name), form):>10}   {ends}".rstrip())
    if found.intervals is None:
        print("one window gives no interval")


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
    quantized, others = _format_bytes(content.quantized_bytes), _format_bytes(content.other_bytes)
    print(
        f"{len(content.layers)} layers, {quantized}, {content.bits_per_weight:.2f} bits per weight; "
        f"{len(content.other_tensors)} tensors kept as they were, {others}; {content.format}"
    )
    _print_engines(content.engines)
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = verify.verify(args.out)
    if args.json:
        _print_json(found.to_dict())
    else:
        for problem in found.problems:
            print(printable(problem))
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
        _print_json({"page": str(page), "pictures": [str(picture) for picture in pictures]})
    else:
        print(page, *pictures, sep="\n")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from gptq import demo  # imports the 465 kB of text that it calibrates on

    with Progress() as progress:
        shown = demo.run(progress)
    if args.json:
        _print_json(shown.to_dict())
        return 0
    print("bits  method         size  bits/weight  perplexity  above original")
    for row in shown.rows:
        above = f"{row.above_original:+.1%}" if row.method != "original" else ""
        print(
            f"{row.bits:4}  {row.method:8}  {_format_bytes(row.bytes):>9}  {row.bits_per_weight:11.2f}  "
            f"{row.perplexity:10.3f}  {above:>14}"
        )
    print(f"\nThe 4-bit GPTQ model continues {shown.prompt.splitlines()[-1]!r}:\n{' '.join(shown.generated.split())}")
    return 0


def _print_json(content: dict[str, Any]) -> None:
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(content, ensure_ascii=not is_utf8))


def _format_bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "quantize": _quantize,
    "plan": _plan,
    "convert": _convert,
    "polish": _polish,
    "eval": _eval,
    "inspect": _inspect,
    "verify": _verify,
    "report": _report,
    "demo": _demo,
}
