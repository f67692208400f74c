"""Read and write checkpoints one tensor at a time; local folders and the Hub."""

from gptq.checkpoint.hub import resolve
from gptq.checkpoint.reader import Source
from gptq.checkpoint.tensors import TensorInfo
from gptq.checkpoint.writer import ShardWriter

__all__ = ["ShardWriter", "Source", "TensorInfo", "resolve"]
