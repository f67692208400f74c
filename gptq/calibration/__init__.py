"""Text or arrays become seeded windows."""

from gptq.calibration.text import documents, draw_windows, evaluation_windows, tokenize

__all__ = ["documents", "draw_windows", "evaluation_windows", "tokenize"]
