"""Quantize a checkpoint as `gptq.pipeline.quantize` does; with `polish_steps`, polish it before it gets its name."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq import formats
from gptq.calibration.arrays import Inputs
from gptq.calibration.windows import HELD_OUT_EVERY
from gptq.config import Format, PolishConfig, QuantConfig
from gptq.errors import InputError
from gptq.evaluation.original_logits import require_causal
from gptq.output.record import read_record
from gptq.pipeline import quantize as pipeline
from gptq.pipeline.quantize import Result
from gptq.pipeline.run import Finished, Observer
from gptq.planning.plan import Plan
from gptq.polishing.polish import Names, polish_folder

POLISHED = "polished"  # subfolder of OUT.partial that becomes OUT


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: str | Path | Tensor | Iterable[Any] = "c4",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    memory_limit: int | None = None,
    gpu_memory_limit: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    also: Sequence[Format] = (),
    observer: Observer | None = None,
) -> Result:
    config, observer = config or QuantConfig(), observer or Observer()
    last = None
    if config.polish_steps:
        if memory_limit is not None or gpu_memory_limit is not None:
            raise InputError(
                "polishing needs memory for the whole packed model, which no limit accounts for; set --polish-steps 0 "
                "and run `gptq polish` on the result, or leave the limit out"
            )
        last = Polishing(config, trust_remote_code, observer)
    return pipeline.quantize(
        model, out, config, calibration=calibration, device=device, dtype=dtype, batch_size=batch_size,
        memory_limit=memory_limit, gpu_memory_limit=gpu_memory_limit, revision=revision,
        trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, also=also, observer=observer, last=last,
    )  # fmt: skip


quantize.__doc__ = pipeline.quantize.__doc__


@dataclass(frozen=True)
class Polishing:
    """The `LastStep` that tunes scales, norms and biases on the windows that calibrated."""

    config: QuantConfig
    trust_remote_code: bool
    observer: Observer

    def check(self, plan: Plan, windows: Sequence[Inputs] | None) -> None:
        """Raises InputError unless the model predicts text and the format has scales that may change by a little."""
        require_causal(plan.network)
        if windows is None:
            raise InputError("polish_steps needs calibration, which the method 'rtn' reads none of; run `gptq polish`")
        if len({tuple(x["input_ids"].shape) for x in windows}) > 1 or any(x.keys() != {"input_ids"} for x in windows):
            raise InputError("polishing takes windows of text of one length; set --polish-steps 0")
        if len(windows) < HELD_OUT_EVERY:
            raise InputError(
                f"{len(windows)} windows leave none to measure polishing on, which needs {HELD_OUT_EVERY} or more"
            )
        if formats.FORMATS[plan.format].is_assembled:
            raise InputError(
                f"a checkpoint in {plan.format} is not loaded here, so it cannot be polished; set --polish-steps 0"
            )
        if not any(formats.FORMATS[x.scheme.format].grid(x.scheme).tunes_scales for x in plan.layers.values()):
            raise InputError(f"{plan.format} has no scales that may change by a little; set --polish-steps 0")

    def run(self, finished: Finished) -> list[str]:
        """Polish into a folder beside the content; a stopped run goes on from the steps that it has taken."""
        working, plan = finished.working, finished.plan
        out = working.root / POLISHED
        if out.exists():  # of a run that was stopped before it could end; nobody knows what happened to it since
            shutil.rmtree(out)
        steps, seq_len = self.config.polish_steps or 0, int(finished.windows[0]["input_ids"].shape[1])
        own = PolishConfig(steps, len(finished.windows), seq_len, self.config.seed)
        record = read_record(working.content)
        names = Names(plan.folder.name, str(record.model), record.calibration)
        windows = torch.cat([x["input_ids"] for x in finished.windows])  # (windows, tokens)
        made = polish_folder(
            working.content, plan.folder, out, own, windows, str(finished.device),
            str(finished.dtype).removeprefix("torch."), self.trust_remote_code, self.observer, names,
        )  # fmt: skip
        working.content = out
        told = f"polished: KL(original || quantized) on held-out windows {made.kl_before:.5f} -> {made.kl_after:.5f}"
        self.observer.note(told)
        return [*made.notes, told]
