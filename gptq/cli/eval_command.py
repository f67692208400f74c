"""`gptq eval`: measure a model, alone or against its original."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gptq.cli.printing import print_json
from gptq.cli.progress import Progress
from gptq.errors import InputError, printable
from gptq.evaluation import evaluate
from gptq.evaluation.quality import Measurement, add_measurement, read_measurements
from gptq.output import verify
from gptq.output.record import PerplexityRecord, public_name, read_record


def run_eval(args: argparse.Namespace) -> int:
    """Run the command with its arguments; return the exit code."""
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
        print_json(found.to_dict())
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
