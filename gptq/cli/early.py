"""Find mistakes that need no library to see, before torch and transformers are imported, which takes seconds."""

import argparse
from dataclasses import fields
from pathlib import Path

from gptq.calibration.sources import require_file
from gptq.checkpoint.atomic_folder import require_unused, require_unused_beside
from gptq.checkpoint.companions import RECORD
from gptq.checkpoint.untrusted import check_folder, local_folder, read_json
from gptq.config import PolishConfig, QuantConfig, require_device, require_dtype
from gptq.errors import InputError


def read_config(args: argparse.Namespace) -> QuantConfig:
    """Make a QuantConfig from the flags that were given; other fields keep their defaults.

    Raises:
        InputError: a value is out of range, or contradicts another one.
    """
    return QuantConfig.from_dict({one.name: getattr(args, one.name) for one in fields(QuantConfig) if one.name in args})


def read_polish_config(args: argparse.Namespace) -> PolishConfig:
    """Make a PolishConfig from the flags that were given; raises InputError as `read_config`."""
    return PolishConfig(**{one.name: getattr(args, one.name) for one in fields(PolishConfig) if one.name in args})


def polished_folder(args: argparse.Namespace) -> Path:
    """The folder that `gptq polish` makes."""
    model = Path(args.model)
    return Path(args.to) if args.to else model.with_name(f"{model.resolve().name}-polished")


def _results(args: argparse.Namespace) -> list[Path]:
    """The folders that a command will make, as far as the arguments tell."""
    also, out = getattr(args, "also", []), Path(args.out)
    return [out / chosen for chosen in (getattr(args, "format", "auto"), *also)] if also else [out]


def check(args: argparse.Namespace) -> None:
    """Check options and names of files.

    Raises:
        InputError: the command cannot succeed.
    """
    config = read_config(args) if args.command in ("quantize", "plan") else None
    if "device" in args:
        require_device(args.device)
        require_dtype(args.dtype)
    models = [model for name in ("model", "against") if (model := getattr(args, name, None)) is not None]
    for model in models:
        _check_model(model)
    if getattr(args, "revision", None) and all(map(local_folder, models)):
        raise InputError(f"--revision names a version on the Hub, and {models[0]} is a folder")
    if args.command in ("quantize", "convert"):
        _check_results(args)
    if args.command in ("inspect", "verify", "report"):
        _require_folder(args.out, args.command)
    if args.command == "report" and args.to is not None and args.to.is_file():
        raise InputError(f"{args.to} is a file; --to names a folder")
    if config is not None and config.method == "gptq":
        require_file(args.calibration)
    if args.command == "polish":
        read_polish_config(args)
        require_unused(polished_folder(args))
        require_file(args.calibration)
    if args.command == "eval":
        _check_measurement(args)


def _check_model(model: str) -> None:
    """Check what can be seen of a model without a library: for a folder, that config.json is JSON."""
    folder = local_folder(model)
    if folder is None:
        return
    check_folder(folder)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json; is it a model folder?")
    read_json(folder / "config.json")


def _check_results(args: argparse.Namespace) -> None:
    results = _results(args)
    require_unused(results[0])
    require_unused_beside(results[0], [folder.name for folder in results[1:]])
    if len(set(results)) < len(results):
        raise InputError("--format is given twice with the same format; once is enough")
    if len(results) > 1 and args.push:
        raise InputError(f"--push uploads one folder, and there is one for each format; upload {args.out}/FORMAT")


def _check_measurement(args: argparse.Namespace) -> None:
    require_file(args.data)
    if args.seq_len < 2:
        raise InputError(f"--seq-len is {args.seq_len}; a window has at least 2 tokens")
    if args.save or args.card:
        _require_folder(Path(args.model), "--save" if args.save else "--card")
    if args.card and not (Path(args.model) / RECORD).exists():
        raise InputError(f"--card writes into the model card of a result of gptq, and {args.model} has no {RECORD}")


def _require_folder(folder: Path, wanted_by: str) -> None:
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; {wanted_by} needs a folder on this machine")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder that holds config.json and the safetensors files")
