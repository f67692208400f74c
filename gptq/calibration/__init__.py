"""Turn text, chats, images or arrays into calibration windows, reproducibly from a seed."""

from gptq.calibration.text import documents, draw_windows, evaluation_windows, tokenize

__all__ = ["documents", "draw_windows", "evaluation_windows", "tokenize"]
