"""Checkpoints whose weights are stored quantized, read as if they held plain weights; one file per kind of storage.

`KINDS` lists the kinds that are recognised from the tensors alone. Kinds whose integers are laid out by a file format
are in `gptq.formats`, where `gptq.formats.original` adds them to these.
"""

from gptq.checkpoint.sources import fp8, mxfp4, nvfp4
from gptq.checkpoint.sources.decoded import Kind

KINDS: tuple[Kind, ...] = (fp8.KIND, mxfp4.KIND, nvfp4.KIND)
