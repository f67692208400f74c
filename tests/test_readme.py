"""The README tells the truth about commands and files."""

import re
import shlex
from pathlib import Path

import pytest

from gptq import cli
from gptq.commands import COMMANDS
from lenet_baseline import __main__ as lenet
from tests.test_layering import RANK

ROOT = Path(__file__).parents[1]
LENET = "python -m lenet_baseline "
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_is_the_one_on_disk() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    folders = dict(re.findall(r"^(\w+)/(.*?)(?=^\w|\Z)", tree, re.MULTILINE | re.DOTALL))
    for package in ("gptq", "lenet_baseline"):
        listed = set(re.findall(r"^    (\w+\.py)", folders[package], re.MULTILINE))
        assert listed == {p.name for p in (ROOT / package).glob("*.py") if not p.name.startswith("__")}
    listed_scripts = set(
        re.findall(r"^    (\w+(?:\.py)?) ", tree.split("\nscripts/")[1].split("\ntests/")[0], re.MULTILINE)
    )
    assert listed_scripts == {p.name for p in (ROOT / "scripts").iterdir() if p.is_file()}


def test_the_package_is_listed_lowest_rank_first() -> None:
    listed = re.findall(r"^    (\w+)\.py", README.split("\ngptq/")[1].split("\nlenet_baseline/")[0], re.MULTILINE)
    assert [RANK[name] for name in listed] == sorted(RANK.values())


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("gptq ", LENET))]


def test_there_are_commands() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line: str) -> None:
    parser, prefix = (lenet.parser(), LENET) if line.startswith(LENET) else (cli._parser(), "gptq ")
    arguments = shlex.split(line.removeprefix(prefix), comments=True)
    command = parser.parse_args(arguments).command
    assert callable(command) or command in COMMANDS


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
