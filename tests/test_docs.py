"""README and docs tell the truth: commands parse and run, Python runs, numbers and links agree.

How a block is treated is visible in its first line:

    ```sh      every `gptq ...` and `python -m lenet_baseline ...` is parsed; `# tested` first: the block is run as well
    ```python  is run, in one namespace for a page, with MODEL = the demo model; `# needs ...` first: is parsed only

A page's blocks run in order in one folder, which holds text.txt.
"""

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import pytest

import gptq
from gptq.cli import arguments
from gptq.cli.commands import COMMANDS
from gptq.demo import MODEL

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "lenet_baseline" / "README.md",
    *(p for p in sorted(DOCS.rglob("*.md")) if "_build" not in p.relative_to(DOCS).parts),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LENET = "python -m lenet_baseline "
MAX_LINES, MAX_WORDS = 150, 1500
NO_ROOMS = {"demo_model", "__pycache__"}  # folders in gptq/ that hold no code


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's fenced code, in order; MyST's directives are left out."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found if language in ("sh", "python")]


def lines_of(text: str) -> list[str]:
    """The commands of a shell block, without comments, with continued lines joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def command_of(line: str) -> tuple[str, list[str]] | None:
    """(tool, arguments) of a line that runs one of our command lines, also through torchrun or accelerate."""
    found = re.match(r"(?:gptq |(?:torchrun|accelerate launch) .*?-m gptq )(.*)", line)
    if found:
        return "gptq", shlex.split(found[1], comments=True)
    if line.startswith(LENET):
        return "lenet", shlex.split(line.removeprefix(LENET), comments=True)
    return None


def is_tested(language: str, text: str) -> bool:
    return text.startswith("# tested") if language == "sh" else not text.startswith("# needs")


def lenet() -> ModuleType:
    pytest.importorskip("sklearn")
    from lenet_baseline import __main__ as module

    return module


# --- commands ---------------------------------------------------------------------------------------------------------


def all_commands() -> list[Any]:
    found = []
    for page, name in zip(PAGES, NAMES, strict=True):
        lines = [line for language, text in blocks(page) if language == "sh" for line in lines_of(text)]
        found += [
            pytest.param(*command_of(line) or ("", []), id=f"{name}: {line}") for line in lines if command_of(line)
        ]
    return found


@pytest.mark.parametrize(("tool", "given"), all_commands())
def test_every_command_is_understood(tool: str, given: list[str]) -> None:
    if tool == "lenet":
        assert callable(lenet().parser().parse_args(given).command)
    else:
        assert arguments.parser().parse_args(given).command in COMMANDS


def test_every_command_has_an_example() -> None:
    shown = {given[0] for parameter in all_commands() for tool, given in [parameter.values] if tool == "gptq"}
    assert shown == set(COMMANDS) - {"demo"}  # which is `make demo`


# --- running ----------------------------------------------------------------------------------------------------------


def run_shell(line: str, variables: dict[str, str]) -> None:
    """Run one line of a tested block in this process: our command lines, `python -c`, and NAME=$(python -c ...)."""
    line = re.sub(r"\$(\w+)", lambda found: shlex.quote(variables[found[1]]), line)
    assigned = re.fullmatch(r"(\w+)=\$\((python -c .*)\)", line)
    called = shlex.split(assigned[2] if assigned else line, comments=True)
    if called[:2] == ["python", "-c"]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(called[2], {})
        if assigned:
            variables[assigned[1]] = printed.getvalue().strip()
        return
    command = command_of(line)
    assert command is not None, f"a tested block holds {line!r}, which no test can run"
    main: Callable[[list[str]], int] = lenet().main if command[0] == "lenet" else arguments.main
    assert main(command[1]) == 0


RUN = [
    pytest.param(page, id=name, marks=pytest.mark.slow)
    for page, name in zip(PAGES, NAMES, strict=True)
    if any(is_tested(*block) for block in blocks(page))
]


@pytest.mark.parametrize("page", RUN)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    Path("text.txt").write_text(text, encoding="utf-8")
    variables, namespace = {"MODEL": str(MODEL)}, {"MODEL": str(MODEL)}
    for language, block in blocks(page):
        if not is_tested(language, block):
            continue
        if language == "python":
            exec(compile(block, f"{page.name}, a Python block", "exec"), namespace)
            continue
        for line in lines_of(block):
            run_shell(line, variables)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_that_is_not_run_is_right_as_far_as_it_goes(page: Path) -> None:
    for language, block in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "gptq":
                assert {alias.name for alias in node.names} <= set(gptq.__all__)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gptq":
                assert node.attr in gptq.__all__


# --- the README -------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES
    assert len(README.split()) <= MAX_WORDS


def test_the_readme_lists_the_rooms_there_are() -> None:
    listed = re.findall(r"^\| `gptq/(\w+)/` \|", README, re.MULTILINE)
    rooms = [p.name for p in (ROOT / "gptq").iterdir() if p.is_dir() and p.name not in NO_ROOMS]
    assert sorted(listed) == sorted(rooms)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", prose):
        if not re.match(r"https?://", link):
            assert (page.parent / link).is_file(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_scripts_and_files_named_exist(page: Path) -> None:
    named = re.findall(
        r"`(?:python )?((?:gptq|lenet_baseline|scripts|tests)/[\w/]+\.py)", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_reference_lists_the_scripts_there_are() -> None:
    rows = tables(DOCS / "reference" / "scripts.md")[0][1:]
    there = {p.name for p in (ROOT / "scripts").iterdir() if p.is_file()}
    assert sorted(name.strip("`") for name, _ in rows) == sorted(there)


def test_the_lenet_readme_lists_the_files_there_are() -> None:
    rows = tables(ROOT / "lenet_baseline" / "README.md")[-1][1:]
    there = {p.name for p in (ROOT / "lenet_baseline").glob("*.py") if not p.name.startswith("__")}
    assert {name.strip("`") for name, _ in rows} == there


# --- numbers ----------------------------------------------------------------------------------------------------------


def numbers() -> dict[str, Any]:
    return dict(json.loads((DOCS / "numbers.json").read_text(encoding="utf-8")))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(page: Path) -> list[list[list[str]]]:
    """The Markdown tables of a page, each a list of rows of cells, without the line of dashes."""
    found = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [[cells(line) for line in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in rows]


@pytest.mark.parametrize(
    ("page", "name"),
    [("README.md", "quality"), ("README.md", "quantizing_memory"), ("lenet_baseline/README.md", "lenet")],
)
def test_tables_agree_with_the_measured_numbers(page: str, name: str) -> None:
    entry = numbers()["tables"][name]
    assert [entry["columns"], *entry["rows"]] in tables(ROOT / page)


def test_the_readme_and_the_reference_agree_about_engines() -> None:
    def about_engines(page: Path) -> list[list[list[str]]]:
        return [table for table in tables(page) if table[0][0] == "Engine"]

    assert len(about_engines(ROOT / "README.md")) == 1
    assert about_engines(ROOT / "README.md") == about_engines(DOCS / "reference" / "engines.md")


def test_the_demo_in_the_readme_is_the_measured_one() -> None:
    assert "```\n" + "\n".join(numbers()["demo"]["lines"]) + "\n```" in README


LENET_FIGURES = (
    "float int8 int8_change int8_interval sigma percentile digits_float digits_rtn digits_gptq digits_interval "
    "digits_max_abs"
)


@pytest.mark.parametrize("name", LENET_FIGURES.split())
def test_prose_about_lenet_agrees_with_the_measured_numbers(name: str) -> None:
    prose = " ".join((ROOT / "lenet_baseline" / "README.md").read_text(encoding="utf-8").split())
    assert numbers()["figures"]["lenet_more"][name] in prose


def test_every_number_says_when_and_where() -> None:
    data = numbers()
    for entry in [data["demo"], *data["tables"].values(), *data["figures"].values()]:
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry["date"])
        assert re.fullmatch(r"[0-9a-f]{7}", entry["commit"])
        assert entry["machine"] in data["machines"]
    for entry in data["tables"].values():
        assert {len(row) for row in entry["rows"]} == {len(entry["columns"])}


# --- the generator of the reference -----------------------------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gptq_reference", DOCS / "ext" / "gptq_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_names_every_command_and_option() -> None:
    page = generator().commands()
    for name in COMMANDS:
        assert f"## gptq {name}\n" in page
    for option in ("--bits N", "--no-desc-act", "--memory-limit SIZE", "--against ORIGINAL"):
        assert option in page


def test_the_reference_names_every_field() -> None:
    page = generator().options()
    for name in gptq.QuantConfig().to_dict():
        assert f"\n`{name}`\n: " in page


def test_every_number_that_a_page_asks_for_is_there() -> None:
    known = generator().substitutions()
    for page in PAGES:
        for name in re.findall(r"\{\{ ?([\w.]+) ?\}\}", page.read_text(encoding="utf-8")):
            value: Any = known
            for part in name.split("."):
                assert part in value, f"{page.name} asks for {name}"
                value = value[part]


# --- promises ---------------------------------------------------------------------------------------------------------

PROMISES = DOCS / "reference" / "promises.md"


def promises() -> list[tuple[str, str, list[str]]]:
    """(page, sentence, tests) of every row."""
    found = []
    for section in PROMISES.read_text(encoding="utf-8").split("\n## ")[1:]:
        page, _, rest = section.partition("\n")
        rows = [cells(line) for line in rest.splitlines() if line.startswith("| ")][1:]
        found += [(page, sentence, re.findall(r"`([^`]+)`", named)) for sentence, named in rows if sentence != "---"]
    return found


def test_what_a_promise_quotes_stands_in_its_page() -> None:
    assert len(promises()) > 100
    for page, sentence, _ in promises():
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert sentence in text, f"{page} no longer says: {sentence}"


def test_behind_every_promise_stands_a_test_that_is_run() -> None:
    defined = {}
    for file in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        defined[file.name] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = [test for _, _, tests in promises() for test in tests]
    broken = re.findall(r"`(test_\w+\.py::\w+)`", PROMISES.read_text(encoding="utf-8"))
    for test in (*named, *broken):
        file, _, function = test.partition("::")
        assert function.startswith("test_"), test
        assert function in defined.get(file, set()), f"{test} is promised and does not exist"
    assert all(tests for _, _, tests in promises())


def test_the_reference_names_what_is_public() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"auto(?:function|class|exception):: gptq\.(\w+)", page))
    assert documented == {*gptq.__all__} - {"__version__"}
