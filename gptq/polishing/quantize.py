"""Quantize a checkpoint as `gptq.pipeline.quantize` does; with `polish_steps`, polish it before it gets its name."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptq import formats
from gptq.calibration.arrays import Inputs
from gptq.config import Format, PolishConfig, QuantConfig
from gptq.errors import InputError
from gptq.evaluation.original_logits import require_causal
from gptq.output.record import read_record
from gptq.pipeline import quantize as pipeline
from gptq.pipeline.quantize import Result
from gptq.pipeline.run import Finished, Observer
from gptq.planning.plan import Plan
from gptq.polishing.polish import Names, join_windows, polish_folder

POLISHED = "polished"  # subfolder of OUT.partial that becomes OUT
CALIBRATION = "the calibration"  # as messages call the source of the windows


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
    """Quantize a Hugging Face checkpoint into a new folder.

    Args:
        model: folder, or Hub id (then at `revision`).
        out: folder to create; it appears only when the run has succeeded. When a run fails or is killed after the first
            block, OUT.partial stays, and the same call resumes after the last finished block.
        calibration: source of text, chats, images, sound or arrays (see `gptq.calibration.sources`); or a
            `datasets.Dataset` or list of rows, a list of texts or of chats; or ready windows of tokens, (windows,
            tokens) integers; or a list of the model's inputs, as dicts of arrays whose first dimension counts windows
            (`input_ids` and `attention_mask` of padded texts, say), or as a processor returns them for one window.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one.
        dtype: of the forward passes: "float32", "bfloat16", "float16"; "auto" is the dtype in config.json, but
            float32 on a CPU without native bfloat16. The solver works in float32 on the stored weights.
        batch_size: how many calibration windows are in mid-block at once (default all). The remaining windows
            repeat the block's forward for each distinct layer input: less memory, more time, the same result.
        memory_limit: largest resident memory of this process in bytes; by default most of the machine's free memory.
            The limit decides on `batch_size` and on whether activations between blocks, and the Hessians of wide
            layers, are in files; it never changes the result. `gpu_memory_limit` limits the memory of the GPU in the
            same way.
        allow_pickle: if the model has pickled weights alone (`pytorch_model*.bin`), convert these to safetensors first,
            in a confined process of its own, into the cache of the Hub's client.
        also: further formats to write the result in, which have to have the grid of `config.format`. Then `out` holds
            a folder for each format, called like it.

    Raises:
        InputError: anything a user can fix; then nothing is left at `out`. This includes an OUT.partial that was begun
            with other options, another model or other calibration windows.
    """
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


@dataclass(frozen=True)
class Polishing:
    """The `LastStep` that tunes scales, norms and embeddings on the windows that calibrated."""

    config: QuantConfig
    trust_remote_code: bool
    observer: Observer

    def check(self, plan: Plan, windows: Sequence[Inputs] | None) -> None:
        """Raises InputError unless the model predicts text and the format has scales that may change by a little."""
        require_causal(plan.network)
        if windows is None:
            raise InputError("polish_steps needs calibration, which the method 'rtn' reads none of; run `gptq polish`")
        join_windows(windows, CALIBRATION)
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
        windows = join_windows(finished.windows, CALIBRATION)
        own = PolishConfig(self.config.polish_steps or 0, len(windows), windows.shape[1], self.config.seed)
        record = read_record(working.content)
        names = Names(plan.folder.name, str(record.model), record.calibration)
        made = polish_folder(
            working.content, plan.folder, out, own, windows, str(finished.device),
            str(finished.dtype).removeprefix("torch."), self.trust_remote_code, self.observer, names,
        )  # fmt: skip
        working.content = out
        told = f"polished: KL(original || quantized) on held-out windows {made.kl_before:.5f} -> {made.kl_after:.5f}"
        self.observer.note(told)
        return [*made.notes, told]
