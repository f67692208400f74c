"""The command line: `python -m lenet_baseline compare|train|quantize|plot`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib  # noqa: F401
    import PIL  # noqa: F401
    import scipy  # noqa: F401
    import sklearn  # noqa: F401
except ModuleNotFoundError as missing:
    sys.exit(f"lenet_baseline: {missing.name} is not installed; in the project's folder: pip install -e '.[lenet]'")

import datasets

from gptq.errors import InputError
from lenet_baseline import compare as comparison
from lenet_baseline.activations import record_activations
from lenet_baseline.data import DIGITS, load
from lenet_baseline.integer import load_integers, quantize_lenet, run_integers, save_integers, simulate
from lenet_baseline.maxabs import RULES
from lenet_baseline.model import BIASED
from lenet_baseline.plots import draw
from lenet_baseline.train import accuracy, logits, train_or_reuse

DESCRIPTION = "A LeNet in int8 by its largest absolute values, and the same layers through GPTQ."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 success, 2 bad input or interrupted."""
    args = parser().parse_args(arguments)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error that it raises
    try:
        command: Callable[[argparse.Namespace], None] = args.command
        command(args)
        return 0
    except InputError as error:
        print(f"lenet_baseline: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output has closed it; without this, Python reports it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"lenet_baseline: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("lenet_baseline: interrupted; models that were finished are kept", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets its function as `command`."""
    top = argparse.ArgumentParser(prog="python -m lenet_baseline", description=DESCRIPTION)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, does, command in (
        ("compare", "train or reuse models, quantize them every way, write results.json and figures", _compare),
        ("train", "train a float model, or find the one that is there, and measure it", _train),
        ("quantize", "write one model as int8 safetensors, read it back and measure it", _quantize),
        ("plot", "draw the figures of an earlier compare again", _plot),
    ):
        p = commands.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".")
        p.add_argument("--out", type=Path, default=Path("lenet-out"), metavar="DIR", help="default: %(default)s")
        p.add_argument("--json", action="store_true", help="one JSON object to stdout")
        p.set_defaults(command=command)
        if command is _plot:
            continue
        source = "digits (no download; the default), a folder in the layout of uoft-cs/cifar10, or a Hub data set"
        p.add_argument("--data", default=DIGITS, metavar="SRC", help=source)
        p.add_argument("--bias", choices=tuple(BIASED), default="all", help="layers with a bias (default: %(default)s)")
        p.add_argument("--epochs", type=_positive, metavar="N", help="default: 15 for digits, 12 otherwise")
        if command is _compare:
            p.add_argument("--seeds", type=_positive, default=5, metavar="N", help="models to train (default: 5)")
        else:
            p.add_argument("--seed", type=_seed, default=0, metavar="N", help="of training and calibration images")
        if command is _quantize:
            p.add_argument("--range", choices=RULES, default="max-abs", help="what becomes 127 (default: %(default)s)")
            p.add_argument("--per-channel", action="store_true", help="a weight scale for each output")
    return top


def _positive(text: str) -> int:
    return _integer_from(text, 1)


def _seed(text: str) -> int:
    return _integer_from(text, 0)


def _integer_from(text: str, least: int) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


# --- the commands -----------------------------------------------------------------------------------------------------


def _compare(args: argparse.Namespace) -> None:
    data = load(args.data)
    results = comparison.compare(data, args.out, args.bias, args.epochs or data.epochs, args.seeds)
    paths = draw(results, args.out)
    if args.json:
        _print_json({key: value for key, value in results.items() if key != "distributions"})
        return
    print(comparison.table(results))
    print(f"\n{args.out / comparison.RESULTS}", *paths, sep="\n")


def _train(args: argparse.Namespace) -> None:
    data = load(args.data)
    model, path = train_or_reuse(args.out, data, args.bias, args.seed, args.epochs or data.epochs)
    found = accuracy(logits(model, data.test), data.test)
    _report(args, {"accuracy": found, "test_images": len(data.test), "model": str(path)}, f"{path}: {found:.2%}")


def _quantize(args: argparse.Namespace) -> None:
    data = load(args.data)
    model, path = train_or_reuse(args.out, data, args.bias, args.seed, args.epochs or data.epochs)
    activations = record_activations(model, data.train.draw(comparison.CALIBRATION_IMAGES, args.seed))
    scales = "channel" if args.per_channel else "tensor"
    written = path.with_name(path.name.replace("float-", f"int8-{args.range}-{scales}-", 1))
    save_integers(quantize_lenet(model, activations, args.range, args.per_channel), written)
    net = load_integers(written)
    simulated = logits(lambda x: simulate(net, x), data.test)
    integers = logits(lambda x: run_integers(net, x), data.test)
    found: dict[str, Any] = {
        "float_accuracy": accuracy(logits(model, data.test), data.test),
        "int8_accuracy": accuracy(integers, data.test),
        "simulated_equals_integer": bool((simulated == integers).all()),
        "float_bytes": path.stat().st_size,
        "int8_bytes": written.stat().st_size,
        "model": str(written),
    }
    text = (
        f"{written}: {found['int8_bytes']} bytes for {found['float_bytes']}, {found['int8_accuracy']:.2%} of "
        f"{len(data.test)} test images for {found['float_accuracy']:.2%}; integer path "
        f"{'equals' if found['simulated_equals_integer'] else 'DIFFERS FROM'} the simulated one"
    )
    _report(args, found, text)


def _plot(args: argparse.Namespace) -> None:
    paths = [str(path) for path in draw(comparison.read_results(args.out), args.out)]
    _report(args, {"figures": paths}, "\n".join(paths))


def _report(args: argparse.Namespace, found: dict[str, Any], text: str) -> None:
    if args.json:
        _print_json(found)
    else:
        print(text)


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
