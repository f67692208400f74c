"""Turn text, chats, images or arrays into calibration windows, reproducibly from a seed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptq.calibration.text import documents, draw_windows, evaluation_windows, tokenize

__all__ = ["documents", "draw_windows", "evaluation_windows", "tokenize"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers when a name is first used: the command line looks for files before that."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gptq.calibration import text

    return getattr(text, name)
