"""What the pages take from the code and from numbers.json: commands, options, tables of measured numbers.

Everything here returns Markdown. `conf.py` writes the generated pages and gives the tables to MyST as substitutions.
"""

import argparse
import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

NUMBERS = Path(__file__).parents[1] / "numbers.json"


def numbers() -> dict[str, Any]:
    """The measured figures, with date, commit and machine."""
    return dict(json.loads(NUMBERS.read_text(encoding="utf-8")))


def table(entry: dict[str, Any]) -> str:
    """A Markdown table of one entry of numbers.json."""
    rows = [entry["columns"], ["---"] * len(entry["columns"]), *entry["rows"]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def measured(entry: dict[str, Any], machines: dict[str, str]) -> str:
    """When, with which commit and where an entry was measured."""
    parts = [f"Measured {entry['date']}", f"commit {entry['commit']}", machines[entry["machine"]]]
    command = f"; `{entry['command']}`" if "command" in entry else ""
    return f"*{', '.join(parts)}*{command}."


def substitutions() -> dict[str, Any]:
    """What `{{ name }}` stands for in the pages: `n.…` for single figures, `table_…` and `when_…` for tables."""
    data = numbers()
    found: dict[str, Any] = {"n": data["figures"], "machine": data["machines"]}
    for name, entry in data["tables"].items():
        found[f"table_{name}"] = table(entry)
        found[f"when_{name}"] = measured(entry, data["machines"])
    for name, entry in data["figures"].items():
        found[f"when_{name}"] = measured(entry, data["machines"])
    demo = data["demo"]
    found["demo"] = "```text\n" + "\n".join(demo["lines"]) + "\n```"
    found["when_demo"] = measured(demo, data["machines"])
    return found


def commands() -> str:
    """The reference page of all commands, from the parser itself."""
    from gptq.cli import arguments

    parts = []
    for name, (parser, about) in subparsers(arguments.parser()).items():
        parts += [f"## gptq {name}", "", f"{sentence(about)}", "", "```text", usage(parser), "```", ""]
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            parts += [f"`{invocation(parser, action)}`", f": {described(parser, action)}", ""]
    return "\n".join(parts)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """Each command's parser and its one line of help, by name."""
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    about = {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {name: (sub, about.get(name, "")) for name, sub in action.choices.items()}


def usage(parser: argparse.ArgumentParser) -> str:
    """The command in one line: what has to be given, and that there are options."""
    given = [a for a in parser._actions if a.required]
    names = [str(a.metavar or a.dest) if not a.option_strings else invocation(parser, a) for a in given]
    return " ".join([parser.prog, *names, "[OPTIONS]"])


def invocation(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """`--bits N`, `--search, --no-search`, or `MODEL`."""
    if not action.option_strings:
        return str(action.metavar or action.dest)
    value = "" if action.nargs == 0 else " " + _value(action)
    return ", ".join(action.option_strings) + value


def _value(action: argparse.Action) -> str:
    if action.metavar:
        return str(action.metavar)
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def described(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """An option's help with its default, as `--help` prints it, escaped for Markdown."""
    help_text = parser._get_formatter()._expand_help(action) if action.help else "…"
    return escaped(" ".join(help_text.split()))


def escaped(text: str) -> str:
    """Text without Markdown's own characters, but for code in backticks."""
    pieces = text.split("`")
    return "`".join(re.sub(r"([*<\[{|])", r"\\\1", piece) if i % 2 == 0 else piece for i, piece in enumerate(pieces))


def sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")")) else ".")


def options() -> str:
    """The reference page of QuantConfig, from its fields and docstring, and the table of efforts."""
    from gptq.config import EFFORTS, QuantConfig, flags

    about, named = arguments_of(QuantConfig), flags(QuantConfig)
    parts = []
    for field in fields(QuantConfig):
        flag = named[field.name].name
        default = "" if field.default is MISSING else f", default `{field.default!r}`"
        kind = re.sub(r"^<class '(.*)'>$", r"\1", str(field.type)).replace("typing.", "").replace("gptq.config.", "")
        parts += [f"`{field.name}`", f": {escaped(about[field.name])}", ""]
        parts += [f"  Type `{kind}`{default}. Command line: `{flag}`.", ""]
    names = list(next(iter(EFFORTS.values())))
    rows = [[f"`{effort}`", *(f"`{values[name]}`" for name in names)] for effort, values in EFFORTS.items()]
    efforts = table({"columns": ["effort", *(f"`{name}`" for name in names)], "rows": rows})
    return "\n".join(["## Fields", "", *parts, "## What an effort sets", "", efforts, ""])


def arguments_of(documented: type) -> dict[str, str]:
    """The entries of a docstring's `Args:` section."""
    text = inspect.getdoc(documented) or ""
    section = re.split(r"^Args:\n", text, maxsplit=1, flags=re.MULTILINE)[1]
    section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL)
    return {name: " ".join(body.split()) for name, body in entries}
