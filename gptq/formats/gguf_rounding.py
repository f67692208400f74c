"""Round tensors that no calibration reaches, embeddings above all, to the nearest values of a block type."""

import torch
from torch import Tensor

from gptq.checkpoint.ggml import Blocks, BlockType

ROWS = 1024  # rows that are rounded at a time


def round_rows(W: Tensor, kind: BlockType) -> Tensor:
    """Return W (rows, inputs) as rows (rows, bytes of a row) of Q8_0 or Q6_K."""
    return torch.cat([kind.pack(_round(part, kind)) for part in W.split(ROWS)])


def _round(W: Tensor, kind: BlockType) -> Blocks:
    """Take the smallest scale that clips nothing; for Q6_K one per group, as an integer times the block's."""
    groups = W.unflatten(1, (-1, kind.group))  # (rows, groups, group)
    step = groups.abs().amax(-1) / (kind.offset - 1)  # (rows, groups)
    if kind.inputs == kind.group:
        d, scales, scale = step.half(), None, step.half().float()
    else:
        blocks = step.unflatten(1, (-1, kind.inputs // kind.group))
        d = (blocks.amax(-1) / 127).half()  # (rows, blocks)
        whole = d.float().repeat_interleave(blocks.shape[-1], 1)
        scales = torch.ceil(step / whole.where(whole > 0, 1)).clamp(max=127).to(torch.int8)
        scale = whole * scales.float()
    codes = torch.round(groups / scale.where(scale > 0, 1)[..., None]) + kind.offset
    return Blocks(codes.clamp(0, 2**kind.bits - 1).to(torch.uint8).flatten(1), d, scales=scales)
