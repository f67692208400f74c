"""Parse the command line, before torch and transformers are imported, so that help and usage errors are quick."""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from gptq.cli.early import check
from gptq.config import FORMATS, Flag, PolishConfig, QuantConfig, flags, parse_integer, parse_positive, parse_size
from gptq.errors import InputError, printable
from gptq.planning.device_models import DEVICE_MODELS
from gptq.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code, which docs/reference/commands.md explains."""
    args = parse(arguments)
    try:
        check(args)
    except InputError as error:
        sys.stderr.write(f"gptq: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(printable(f"gptq: {error.filename}: {error.strerror}") + "\n")
        return 2
    with _uncollected():
        from gptq.cli.commands import run  # imports torch and transformers, which takes seconds

    return run(args)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return a command's arguments; a mistake in them is told with the command's name, and exits with 2."""
    made = parser()
    args, unknown = made.parse_known_args(arguments)
    own = made.commands[args.command]
    if unknown:
        known = [flag for action in own._actions for flag in action.option_strings]
        near = get_close_matches(unknown[0].partition("=")[0], known, 1)
        own.error(f"unknown argument {unknown[0]}{f', did you mean {near[0]}?' if near else ''}")
    if "bits" in args and ("target_bits" in args or "target_size" in args):
        own.error("--bits is the width of all layers, and --target-bits and --target-size choose each layer's")
    return args


class _Parser(argparse.ArgumentParser):
    """Tells of a mistake in a line, and not in a screen with all flags."""

    commands: Mapping[str, "_Parser"]  # of the outermost

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, Python does not search for unreachable objects, which takes a fifth of the time of imports."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def parser() -> _Parser:
    """Make the parser of the command line."""
    made = _Parser(prog="gptq", description="Quantize Hugging Face checkpoints with GPTQ.")
    made.add_argument("--version", action="version", version=f"gptq {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made.commands = commands.choices
    source_help = (
        "a .txt, .jsonl, .csv or .parquet file (column `text`), a folder that datasets loads (FOLDER:SPLIT), "
        "or a Hub data set (wikitext:wikitext-2-raw-v1:test)"
    )

    p = commands.add_parser("quantize", help="quantize a checkpoint", formatter_class=_Help)
    p.add_argument("model", metavar="MODEL", help="folder or Hub id of a safetensors checkpoint")
    p.add_argument(
        "out", metavar="OUT",
        help="folder to make; must not exist or be empty. What a stopped run finished is in OUT.partial: the same "
        "command goes on from there",
    )  # fmt: skip
    _add_quantization_flags(p, source_help)
    _add_upload_flags(p)
    _add_common_flags(p)

    p = commands.add_parser("plan", help="what quantize would do, and who loads the result", formatter_class=_Help)
    p.add_argument("model", metavar="MODEL", help="folder or Hub id of a safetensors checkpoint")
    _add_quantization_flags(p, source_help)
    p.add_argument(
        "--ranks",
        type=_argument_type(parse_positive),
        metavar="N",
        help="also what each of N processes does; see --device-model",
    )
    p.add_argument(
        "--device-model", choices=sorted(DEVICE_MODELS), default="h200",
        help="device of each of these processes, by its data sheet; it is not measured",
    )  # fmt: skip
    _add_common_flags(p)

    p = commands.add_parser("convert", help="write a quantized checkpoint in another format, bit for bit")
    p.add_argument("model", metavar="IN", help="folder or Hub id of a quantized checkpoint, of any tool")
    p.add_argument("out", metavar="OUT", help="folder to make; must not exist or be empty")
    p.add_argument("--format", required=True, choices=FORMATS, help="of the new file")
    _add_upload_flags(p)
    p.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    _add_trust_flag(p)
    p.add_argument("--json", action="store_true", help="one JSON object to stdout")

    p = commands.add_parser(
        "polish", help="tune the scales and norms of a quantized checkpoint on the original's predictions",
        formatter_class=_Help,
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL", help="folder of a quantized checkpoint; it stays as it is")
    p.add_argument("--against", metavar="ORIGINAL", required=True, help="folder or Hub id of what it was made from")
    p.add_argument("--to", metavar="OUT", help="folder to make; MODEL-polished if not given. A stopped run goes on")
    for one in fields(PolishConfig):
        _add_option_flag(p, one.name, one.default, flags(PolishConfig)[one.name])
    p.add_argument("--calibration", default="c4", metavar="SRC", help=source_help)
    _add_common_flags(p, revision=False)

    p = commands.add_parser(
        "eval", help="measure perplexity, and the distance from the original", formatter_class=_Help
    )
    p.add_argument("model", metavar="MODEL", help="folder or Hub id, quantized or not")
    p.add_argument("--data", required=True, metavar="SRC", help=source_help)
    p.add_argument("--seq-len", type=_argument_type(parse_integer), default=2048, metavar="N", help="tokens per window")
    p.add_argument(
        "--windows", type=_argument_type(parse_positive), metavar="N", help="measure only the first N windows"
    )
    p.add_argument("--card", action="store_true", help="write the result into the model card of MODEL, a folder")
    p.add_argument(
        "--against", metavar="ORIGINAL",
        help="also the original's perplexity, KL divergence and top-1 agreement, with intervals; "
        "folder or Hub id",
    )  # fmt: skip
    p.add_argument("--save", action="store_true", help="keep the result in MODEL/quality.json, for `gptq report`")
    _add_common_flags(p)

    for name, does in (
        ("inspect", "what a quantized checkpoint holds, layer by layer"),
        ("verify", "reopen, unpack, and compare with what was recorded when it was written"),
    ):
        p = commands.add_parser(name, help=does)
        p.add_argument("out", metavar="OUT", type=Path, help="folder of a quantized checkpoint")
        p.add_argument("--json", action="store_true", help="one JSON object to stdout")
        if name == "verify":
            _add_trust_flag(p)

    p = commands.add_parser(
        "report", help="draw what was recorded: one HTML page, and its charts as SVG files beside it"
    )
    p.add_argument("out", metavar="OUT", type=Path, help="folder of a quantized checkpoint")
    p.add_argument("--to", metavar="FOLDER", type=Path, help="where to write; OUT/report if not given")
    p.add_argument("--json", action="store_true", help="one JSON object to stdout")

    p = commands.add_parser("demo", help="quantize and measure the small model that ships with the package")
    p.add_argument("--json", action="store_true", help="one JSON object to stdout")
    return made


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default == [] or action.required
        return action.help if silent else super()._get_help_string(action)


def _argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap a converter so that argparse prints the sentence of its InputError as a usage error."""

    @wraps(parse)
    def parse_text(text: str) -> Any:
        try:
            return parse(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_text


def _add_quantization_flags(parser: argparse.ArgumentParser, source_help: str) -> None:
    """Add a flag for each field of QuantConfig, and the flags for calibration data and memory."""
    for one in fields(QuantConfig):
        _add_option_flag(parser, one.name, one.default, flags(QuantConfig)[one.name])
    parser.add_argument(
        "--calibration", default="c4", metavar="SRC",
        help=f"{source_help}; chats (column `messages`), images and sound (`image`, `images`, `audio`) likewise; for "
        "other models, a .npz or .safetensors file (or a folder of them) of what the model is called on: pixel_values, "
        "input_features, input_ids and attention_mask ...",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=_argument_type(parse_positive), metavar="N",
        help="calibration windows in mid-block at once: fewer than all saves memory and repeats forwards; same bytes",
    )  # fmt: skip
    parser.add_argument(
        "--memory-limit", type=_argument_type(parse_size), metavar="SIZE",
        help="of the process, such as 3GiB; by default most of what is free. It changes the time, not a byte",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-memory-limit", type=_argument_type(parse_size), metavar="SIZE", help="the same for a GPU's memory"
    )


class _FirstAndOthers(argparse.Action):
    """Store the first value that is given; the others go into the list `also`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.dest in namespace:
            namespace.also = [*getattr(namespace, "also", []), values]
        else:
            setattr(namespace, self.dest, values)


def _add_option_flag(parser: argparse.ArgumentParser, name: str, default: Any, flag: Flag) -> None:
    """Add a flag whose value is stored under the name of its field, and only if the flag is given."""
    shown = (
        flag.help
        if default is None or default == () or isinstance(default, bool)
        else f"{flag.help} (default: {default})"
    )
    if flag.parse is None:
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if default is not None:
            how = {"action": "store_const", "const": not default}
    else:
        how = {"type": _argument_type(flag.parse), "metavar": flag.metavar, "choices": flag.choices}
        if default == ():
            how["action"] = "append"
        if name == "format":
            how["action"] = _FirstAndOthers
    parser.add_argument(flag.name, dest=name, default=argparse.SUPPRESS, help=shown, **how)


def _add_upload_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--push", metavar="REPO", help="then upload OUT to this model repository on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private, where it is new")


def _add_common_flags(parser: argparse.ArgumentParser, revision: bool = True) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    parser.add_argument("--dtype", default="auto", help="of forward passes: float32, bfloat16, float16")
    if revision:
        parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    _add_trust_flag(parser)
    parser.add_argument(
        "--allow-pickle", action="store_true",
        help="convert pytorch_model*.bin to safetensors first, in a confined process of its own",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object to stdout")


def _add_trust_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint"
    )
