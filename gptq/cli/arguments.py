"""The command line's arguments; it is read before torch and transformers, so that help and mistakes are quick."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptq.config import EFFORTS, FORMATS, QuantConfig, parse_size
from gptq.errors import InputError
from gptq.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 `verify` found a difference, 2 bad input or interrupted."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if "bits" in args and (args.target_bits is not None or args.target_size is not None):
        parser.error("--bits is the width of all layers, and --target-bits and --target-size choose each layer's")
    from gptq.cli.commands import run  # imports everything

    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gptq", description="Quantize Hugging Face checkpoints with GPTQ.")
    parser.add_argument("--version", action="version", version=f"gptq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    source_help = (
        "a .txt, .jsonl or .parquet file (column `text`), a folder that datasets loads (FOLDER:SPLIT), "
        "or a Hub data set (wikitext:wikitext-2-raw-v1:test)"
    )

    p = commands.add_parser("quantize", help="quantize a checkpoint", formatter_class=_Help)
    p.add_argument("model", metavar="MODEL", help="folder or Hub id of a safetensors checkpoint")
    p.add_argument(
        "out", metavar="OUT",
        help="folder to make; must not exist or be empty. What a stopped run finished is in OUT.partial: the same "
        "command goes on from there",
    )  # fmt: skip
    _add_options(p, source_help)
    _add_push(p)
    _add_common(p)

    p = commands.add_parser("plan", help="what quantize would do, and who loads the result", formatter_class=_Help)
    p.add_argument("model", metavar="MODEL", help="folder or Hub id of a safetensors checkpoint")
    _add_options(p, source_help)
    _add_common(p)

    p = commands.add_parser("convert", help="write a quantized checkpoint in another format, bit for bit")
    p.add_argument("model", metavar="IN", help="folder or Hub id of a quantized checkpoint, of any tool")
    p.add_argument("out", metavar="OUT", help="folder to make; must not exist or be empty")
    p.add_argument("--format", required=True, choices=FORMATS, help="of the new file")
    _add_push(p)
    p.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    p.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint")
    p.add_argument("--json", action="store_true", help="one JSON object to stdout")

    p = commands.add_parser(
        "eval", help="measure perplexity, and the distance from the original", formatter_class=_Help
    )
    p.add_argument("model", metavar="MODEL", help="folder or Hub id, quantized or not")
    p.add_argument("--data", required=True, metavar="SRC", help=source_help)
    p.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens per window")
    p.add_argument("--windows", type=int, metavar="N", help="measure only the first N windows")
    p.add_argument("--card", action="store_true", help="write the result into the model card of MODEL, a folder")
    p.add_argument(
        "--against", metavar="ORIGINAL",
        help="also the original's perplexity, KL divergence and top-1 agreement, with intervals; "
        "folder or Hub id, read block by block",
    )  # fmt: skip
    p.add_argument("--save", action="store_true", help="keep the result in MODEL/quality.json, for `gptq report`")
    _add_common(p)

    for name, does in (
        ("inspect", "what a quantized checkpoint holds, layer by layer"),
        ("verify", "reopen, unpack, and compare with what was recorded when it was written"),
    ):
        p = commands.add_parser(name, help=does)
        p.add_argument("out", metavar="OUT", type=Path, help="folder of a quantized checkpoint")
        p.add_argument("--json", action="store_true", help="one JSON object to stdout")

    p = commands.add_parser("report", help="draw what was recorded: one HTML page, and PNGs beside it")
    p.add_argument("out", metavar="OUT", type=Path, help="folder of a quantized checkpoint")
    p.add_argument("--to", metavar="FOLDER", type=Path, help="where to write; OUT/report if not given")
    p.add_argument("--json", action="store_true", help="one JSON object to stdout")

    p = commands.add_parser("demo", help="quantize and measure the small model that ships with the package")
    p.add_argument("--json", action="store_true", help="one JSON object to stdout")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default == [] or action.required
        return action.help if silent else super()._get_help_string(action)


def _samples(text: str) -> Any:
    return text if text == "auto" else int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_options(parser: argparse.ArgumentParser, source_help: str) -> None:
    """The options that QuantConfig is made of, and the calibration text."""
    parser.add_argument(
        "--bits", type=int, default=argparse.SUPPRESS, metavar="N", help=f"2 to 8 (default: {QuantConfig.bits})"
    )
    parser.add_argument("--group-size", type=int, default=128, metavar="N", help="inputs per scale; -1: one per row")
    parser.add_argument("--asym", action="store_true", help="give every group a zero point of its own")
    parser.add_argument(
        "--format", choices=("auto", *FORMATS), default="auto",
        help="gptq (v1), gptq_v2, or compressed-tensors' pack-quantized; auto is what most engines take",
    )  # fmt: skip
    parser.add_argument(
        "--override", action="append", default=[], metavar="RE:OPTS",
        help="options of the layers in whose names RE is found: 'down_proj:bits=8,group_size=32', 'layers.0.:skip'; "
        "may be repeated, later ones win",
    )  # fmt: skip
    parser.add_argument(
        "--lm-head",
        action="store_true",
        help="quantize the output head too, untied from the embedding where it was tied",
    )
    parser.add_argument(
        "--effort", choices=tuple(EFFORTS), default="balanced",
        help="fast: one forward per window; balanced: two, and lower perplexity; best: blocks tuned as well, "
        "some forty times as long; the five below follow from it",
    )  # fmt: skip
    parser.add_argument("--target-bits", type=float, metavar="X", help="mixed widths: bits per weight on the average")
    parser.add_argument("--target-size", type=_size, metavar="SIZE", help="mixed widths: of the files, such as 3.5GB")
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument(
        "--search", action=yes_no, help="search each group's grid instead of taking one without clipping"
    )
    parser.add_argument("--desc-act", action=yes_no, help="quantize inputs with large activations first (act-order)")
    parser.add_argument("--sweeps", type=int, metavar="N", help="rounds of refitting scales and codes after the solve")
    parser.add_argument("--two-streams", action=yes_no, help="make up for what earlier layers have changed")
    parser.add_argument("--tune-steps", type=int, metavar="N", help="steps of gradient descent on each solved block")
    parser.add_argument(
        "--dynamic-groups",
        action="store_true",
        help="fit scales as columns are reached; with --desc-act this needs g_idx",
    )
    parser.add_argument(
        "--method", choices=("gptq", "rtn"), default="gptq",
        help="rtn: round to nearest, without calibration, so that --effort and what follows from it mean nothing",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", default="c4", metavar="SRC",
        help=f"{source_help}; for other models than text's, a .npz or .safetensors file (or a folder of them) of what "
        "the model is called on: pixel_values, input_features, input_ids and attention_mask ...",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=_samples, default=128, metavar="N", help="calibration windows; auto: as many as pay"
    )
    parser.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens per window")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of windows")
    parser.add_argument(
        "--damp-percent", type=float, default=0.01, metavar="X", help="fraction of the Hessian's mean diagonal"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N",
        help="calibration windows in mid-block at once: fewer than all saves memory and repeats forwards; same bytes",
    )  # fmt: skip
    parser.add_argument(
        "--memory-limit", type=_size, metavar="SIZE",
        help="of the process, such as 3GiB; by default most of what is free. It changes the time, not a byte",
    )  # fmt: skip
    parser.add_argument("--gpu-memory-limit", type=_size, metavar="SIZE", help="the same for a GPU's memory")


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--push", metavar="REPO", help="then upload OUT to this model repository on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private, where it is new")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    parser.add_argument("--dtype", default="auto", help="of forward passes: float32, bfloat16, float16")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object to stdout")
