"""The command line: parse arguments, run commands, show progress."""

from gptq.cli.arguments import main

__all__ = ["main"]
