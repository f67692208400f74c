"""The README tells the truth about commands and files."""

import re
import shlex
from pathlib import Path

import pytest

from gptq.cli import arguments as cli
from gptq.cli.commands import COMMANDS
from lenet_baseline import __main__ as lenet

ROOT = Path(__file__).parents[1]
LENET = "python -m lenet_baseline "
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("gptq ", LENET))]


def test_there_are_commands() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line: str) -> None:
    parser, prefix = (lenet.parser(), LENET) if line.startswith(LENET) else (cli.parser(), "gptq ")
    arguments = shlex.split(line.removeprefix(prefix), comments=True)
    command = parser.parse_args(arguments).command
    assert callable(command) or command in COMMANDS


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
