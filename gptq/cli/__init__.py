"""Arguments, commands, progress: what a person types and sees."""

from gptq.cli.arguments import main

__all__ = ["main"]
