"""Polish a quantized checkpoint: change its scales, norms and embeddings so that it predicts as the original does.

Quantization minimizes the error of layers and blocks. What counts is the model's output, so that this last step
minimizes KL(original || quantized) over the calibration windows (as DWQ of mlx-lm does, and the second phase of
EfficientQAT, arXiv 2407.11062). Codes stay: one number per group learns from few tokens what one per weight would need
very many for. Embeddings, which have no codes, move in the rows of the tokens that the windows have. Memory holds the
packed model, these rows five times in float32, one dequantized block, one window's activations between blocks, and
those inside blocks while they take less than MOST_OF_MEMORY.

    original -> its most probable tokens, in a file -> steps of Adam on relative changes -> the best on held-out windows
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.calibration.arrays import Inputs
from gptq.calibration.windows import HELD_OUT_EVERY, make_windows, read_calibration
from gptq.checkpoint.assembled import open_source
from gptq.checkpoint.atomic_folder import PartialFolder, partial_folder
from gptq.checkpoint.hub import resolve
from gptq.checkpoint.small_files import write_file
from gptq.checkpoint.source_state import SourceState, fingerprint
from gptq.checkpoint.untrusted import read_json
from gptq.compute.matmul import exact_float32
from gptq.compute.torch_state import fresh_torch_state, same_gradients
from gptq.config import PolishConfig, QuantConfig
from gptq.errors import InputError
from gptq.evaluation.original_logits import compute_original_logits, require_causal
from gptq.formats.quantization_config import quantization_of
from gptq.inference.load import load
from gptq.models.attention import attention_by_products
from gptq.models.blocks import find_blocks
from gptq.models.build import OpenModel, open_model
from gptq.models.hf_config import choose_device, choose_dtype
from gptq.models.weights import WeightStream
from gptq.output.convert import inherit_record
from gptq.output.record import PolishRecord, model_name, public_name
from gptq.output.rewrite import describe_packed, rewrite
from gptq.pipeline.run import Observer
from gptq.pipeline.run_identity import checksum_of_windows, decisive_files, list_changes
from gptq.planning.memory import free_bytes
from gptq.polishing.activations import bounded_activations
from gptq.polishing.descent import STATE, Descent, Variables
from gptq.polishing.scaled_linear import scaled_layers
from gptq.polishing.teacher import record_teacher
from gptq.version import __version__

BEGUN = "polish.json"  # file of OUT.partial: everything that the result depends on
MOST_OF_MEMORY = 0.25  # of what is free, that activations inside blocks may take instead of being computed again


@dataclass(frozen=True)
class Polished:
    """The result of `polish`; KL(original || quantized) is in nats per token, on held-out windows."""

    out: str
    steps: int  # after which the result was best
    kl_before: float
    kl_after: float
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def polish(
    model: str | Path,
    original: str | Path,
    out: str | Path,
    config: PolishConfig | None = None,
    *,
    calibration: str | Path | Tensor | Iterable[Any] = "c4",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    observer: Observer | None = None,
) -> Polished:
    """Write a quantized checkpoint with scales, norms and embeddings that bring it closer to its original.

    Args:
        model: folder or Hub id of a quantized checkpoint that `gptq.load` reads, of any tool.
        original: folder or Hub id of the checkpoint that it was made from.
        out: folder to create. What a stopped run has reached is in OUT.partial, and the same call goes on from there.
        calibration, device, dtype, allow_pickle: as for `gptq.quantize`; windows are text or numbers of tokens.

    Raises:
        InputError: anything a user can fix; then nothing is left at `out`. This includes a model whose format has no
            scales that may change by a little, such as K-quants.
    """
    folders = resolve(str(model), None), resolve(str(original), None, allow_pickle)
    return polish_folder(
        *folders, Path(out), config or PolishConfig(), calibration, device, dtype, trust_remote_code,
        observer or Observer(), Names(str(model), str(original), None),
    )  # fmt: skip


@dataclass(frozen=True)
class Names:
    """What messages and the record call things."""

    model: str
    original: str
    calibration: str | None  # None: as the source of the windows is called


@fresh_torch_state()
def polish_folder(
    folder: Path, original_folder: Path, out: Path, config: PolishConfig, calibration: Any, device: str, dtype: str,
    trust_remote_code: bool, observer: Observer, names: Names,
) -> Polished:  # fmt: skip
    """Do what `polish` says, with folders in place of names."""
    started = time.monotonic()
    states = [SourceState.of(folder), SourceState.of(original_folder)]
    opened = open_model(open_source(folder), trust_remote_code)
    if quantization_of(folder) is None:
        raise InputError(f"{names.model} is not a quantized checkpoint: its config.json has no quantization_config")
    packed = describe_packed(opened)
    require_causal(opened.network)
    windows, name, notes = _read_windows(calibration, config, folder, opened, trust_remote_code)
    where = choose_device(device)
    compute = choose_dtype(dtype, opened.hf_config, where)
    for note in notes:
        observer.note(note)
    with partial_folder(out) as working, exact_float32(where):
        _resume(working, _describe(config, opened, original_folder, windows, where, compute))
        observer.stage(f"reading what {names.original} predicts")
        logits = compute_original_logits(original_folder, windows, where, dtype, trust_remote_code)
        teacher = record_teacher(working.root, logits, len(windows), windows.shape[1] - 1, observer)
        network = load(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        for state in states:  # while nothing is kept of what was read
            state.require_same()
        blocks = [network.get_submodule(block.name) for block in find_blocks(opened.network)]
        most = int(MOST_OF_MEMORY * free_bytes(where))
        with (
            scaled_layers(network) as layers,
            bounded_activations(blocks, most),
            same_gradients(where),
            attention_by_products(),
        ):
            if not layers:
                raise InputError(f"{names.model} has no scales that may change by a little; its format fixes them")
            own = WeightStream(opened.source, opened.names, where, compute)
            tokens = windows.to(where)
            variables = Variables(network, layers, own, tokens.unique())
            descent = Descent(network, tokens, teacher, variables, config, working.root, observer)
            reached = descent.run()
            codes, tensors = variables.stored(packed.stored)
            after = descent.held_out_divergence()
        if not after < reached.before:
            notes.append("no step brought the model closer to the original, so it stays as it was")
            observer.note(notes[-1])
            codes, tensors, after = {}, {}, reached.before
        inherited = inherit_record(names.model, folder)
        record = (inherited.without_perplexity() if codes or tensors else inherited).model_copy(
            update={"polish": PolishRecord(
                original=model_name(names.original), calibration=public_name(names.calibration or name),
                config=config.to_dict(),
                steps=reached.best_step, kl_before=reached.before, kl_after=after,
            )}
        )  # fmt: skip
        working.require_ours()
        working.clear()
        rewrite(packed, working.content, codes, tensors, record)
        for state in states:
            state.require_same()
    return Polished(str(out), reached.best_step, reached.before, after, notes, time.monotonic() - started)


def _read_windows(
    given: Any, config: PolishConfig, folder: Path, opened: OpenModel, trust_remote_code: bool
) -> tuple[Tensor, str, list[str]]:
    """Return the calibration windows (windows, tokens), the name of their source, and notes for the user.

    Raises:
        InputError: the source is no text, or too short.
    """
    as_drawn = QuantConfig(num_samples=config.num_samples, seq_len=config.seq_len, seed=config.seed)
    source = read_calibration(given, as_drawn, folder, None, trust_remote_code)
    drawn, notes = make_windows(source, config.num_samples, folder, opened.network, as_drawn, trust_remote_code)
    return join_windows(drawn, source.name), source.name, notes


def join_windows(windows: Sequence[Inputs], name: str) -> Tensor:
    """Return windows of text as one array, (windows, tokens); `name` is that of their source.

    Raises:
        InputError: they are not all of text and of one length, or too few to measure on some of them.
    """
    of_text = all(window.keys() == {"input_ids"} for window in windows)
    if not of_text or len({window["input_ids"].shape for window in windows}) > 1:
        raise InputError(
            f"{name} gives windows of several lengths or of more than text; polishing takes windows of text of one "
            "length"
        )
    if len(windows) < HELD_OUT_EVERY:
        raise InputError(f"{len(windows)} windows leave none to measure on; polishing needs {HELD_OUT_EVERY} or more")
    return torch.cat([window["input_ids"] for window in windows])


def _describe(
    config: PolishConfig, opened: OpenModel, original: Path, windows: Tensor, where: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return everything that the result depends on."""
    return {
        "version": __version__,
        "options": {**config.to_dict(), "dtype": str(dtype).removeprefix("torch."), "device": where.type},
        "model": {file.name: fingerprint(file) for file in decisive_files(opened.source)},
        "original": {file.name: fingerprint(file) for file in decisive_files(open_source(original))},
        "windows": checksum_of_windows([{"input_ids": windows}]),
    }


def _resume(working: PartialFolder, begun: dict[str, Any]) -> None:
    """Keep what an earlier run of the same kind has reached, or begin anew.

    Raises:
        InputError: the earlier run was begun with something else.
    """
    file, state = working.root / BEGUN, working.root / STATE
    changed = list_changes(read_json(file), begun) if file.is_file() else []
    if changed and state.is_file():
        raise InputError(f"{working.root} was begun with {' and '.join(changed)}; give the same, or remove it")
    if changed or not file.is_file():  # a state without the file is what a removal has left that was stopped midway
        working.clear()
        write_file(file, json.dumps(begun))
    working.describe_kept = lambda: (
        f"{working.root} keeps the steps that were taken, and the command that began it goes on from there"
        if state.is_file()
        else ""
    )
