"""Find mistakes that need no library to see, before torch and transformers are imported, which takes seconds."""

import argparse
from dataclasses import fields
from pathlib import Path

from gptq.calibration.sources import require_file
from gptq.checkpoint.atomic_folder import require_unused
from gptq.checkpoint.untrusted import local_folder
from gptq.config import PolishConfig, QuantConfig
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
    for model in (getattr(args, "model", None), getattr(args, "against", None)):
        if model is not None:
            local_folder(model)
    if args.command in ("quantize", "convert"):
        for folder in _results(args):
            require_unused(folder)
        if len(_results(args)) > 1 and args.push:
            raise InputError(f"--push uploads one folder, and there is one for each format; upload {args.out}/FORMAT")
    if config is not None and config.method == "gptq":
        require_file(args.calibration)
    if args.command == "polish":
        read_polish_config(args)
        require_unused(polished_folder(args))
        require_file(args.calibration)
    if args.command == "eval":
        require_file(args.data)
