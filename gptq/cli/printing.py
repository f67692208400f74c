"""How commands print results."""

import json
import sys
from typing import Any

from gptq.formats import compatibility


def print_json(content: dict[str, Any]) -> None:
    """Print one line of JSON; ASCII alone where stdout takes no UTF-8."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(content, ensure_ascii=not is_utf8))


def print_engines(found: list[compatibility.Engine]) -> None:
    """Print which inference engines take a checkpoint, and why."""
    for engine in found:
        print(f"{engine.name:13} {'yes' if engine.takes else 'no':3}  {engine.why}".replace("`", ""))


def format_bytes(count: int) -> str:
    """Return a size for people, in decimal units."""
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
