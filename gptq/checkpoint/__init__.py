"""Bytes on disk, one tensor at a time."""

from gptq.checkpoint.reader import ShardWriter, Source, TensorInfo, resolve

__all__ = ["ShardWriter", "Source", "TensorInfo", "resolve"]
