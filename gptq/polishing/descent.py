"""Adam on the scales, offsets, norms, biases and embeddings of a whole model, towards the predictions of the original.

Windows are run one at a time, short ones together.
"""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from gptq.calibration.windows import held_out_windows
from gptq.checkpoint.small_files import sync_path
from gptq.checkpoint.tensors import tensor_bytes
from gptq.config import SEEDS, TUNE_TOKENS, PolishConfig
from gptq.errors import InputError
from gptq.models.forward import run_forward
from gptq.models.weights import WeightStream, join_names
from gptq.pipeline.run import Observer
from gptq.pipeline.tune import ParameterKey, is_small, substituted
from gptq.polishing.scaled_linear import ScaledLinear
from gptq.polishing.teacher import Teacher
from gptq.polishing.token_rows import find_token_rows
from gptq.solver.codes import Codes

RATE = 4e-3  # learning rate at the start, relative to the size of what changes
STEP_WINDOWS = 2  # calibration windows per step
CHECK_EVERY = 30  # steps between two measurements on held-out windows; then the state is saved too
STEP_SEEDS = 1_000_003  # distance of the seeds of two runs, so that no two orders of them are alike
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, by the names that torch gives them
PATIENCE = 3  # measurements without an improvement, after which the run ends
STATE = "polish.safetensors"  # file of OUT.partial: how far a run has come


class Variables:
    """What Adam changes: relative changes of scales, offsets, norms, biases and rows of embeddings. All start at 0."""

    def __init__(
        self, network: PreTrainedModel, layers: dict[str, ScaledLinear], weights: WeightStream, tokens: Tensor
    ) -> None:
        """Args:
        tokens: whose rows of the embedding and the output head may change, (tokens,) integers, each once.
        """  # fmt: skip
        self._layers, self._weights = layers, weights
        self._rows = find_token_rows(network, weights, tokens)
        self._names = {
            (module, key): join_names(path, key)
            for path, module in network.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and is_small(parameter) and weights.is_stored_whole(join_names(path, key))
        }
        self._small = {key: key[0]._parameters[key[1]].detach() for key in self._names}
        self._sizes = {key: p.float().square().mean().sqrt() for key, p in self._small.items()}
        self._changes = {
            key: torch.zeros_like(p, dtype=torch.float32, requires_grad=True) for key, p in self._small.items()
        }

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the model."""
        of_layers = [own for layer in self._layers.values() for own in layer.parameters()]
        return [*of_layers, *self._changes.values(), *(rows.change for rows in self._rows)]

    def parameters(self) -> dict[ParameterKey, Tensor]:
        """Return norms, biases and embeddings with their changes applied; gradients reach the changes."""
        found = self._small_parameters()
        for rows in self._rows:
            found |= rows.parameters()
        return found

    def _small_parameters(self) -> dict[ParameterKey, Tensor]:
        return {key: (p + self._sizes[key] * self._changes[key]).to(p.dtype) for key, p in self._small.items()}

    @torch.no_grad()
    def stored(self, names: Mapping[str, str]) -> tuple[dict[str, Codes], dict[str, Tensor]]:
        """Round all to what the file can hold; return layers and other tensors by their names in the checkpoint.

        Args:
            names: of packed layers in the checkpoint, by their names in the model.
        """
        codes: dict[str, Codes] = {}
        for name, layer in self._layers.items():
            rounded = layer.round()
            if rounded is not None:
                codes[names[name]] = rounded
        small = {self._names[key]: tensor for key, tensor in self._small_parameters().items()}
        tensors = dict(self._weights.to_stored(name, tensor) for name, tensor in small.items())
        return codes, tensors | dict(rows.stored(self._weights) for rows in self._rows)


@dataclass
class Reached:
    """How far a run has come."""

    step: int  # steps taken
    before: float  # KL on held-out windows at the start
    best: float  # the lowest KL there
    best_step: int


def _digest(reached: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of what the state's file holds."""
    digest = hashlib.sha256(reached.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor.contiguous()))
    return digest.hexdigest()


class Descent:
    """Adam on the variables, its state in a file every CHECK_EVERY steps."""

    def __init__(
        self, network: PreTrainedModel, windows: Tensor, teacher: Teacher, variables: Variables, config: PolishConfig,
        folder: Path, observer: Observer,
    ) -> None:  # fmt: skip
        self._network, self._windows, self._teacher, self._variables = network, windows, teacher, variables
        self._config, self._file, self._observer = config, folder / STATE, observer
        self._held_out = held_out_windows(len(windows))
        self._learned = sorted({*range(len(windows))} - {*self._held_out})
        self._best = [x.detach().clone() for x in variables.tensors()]
        self._optimizer = torch.optim.Adam(variables.tensors(), lr=RATE, betas=(0.9, 0.95))

    def run(self) -> Reached:
        """Take the steps that are left; leave the variables at what was best on the held-out windows."""
        reached, steps = self._open(), self._config.steps
        while reached.step < steps and reached.step - reached.best_step < PATIENCE * CHECK_EVERY:
            self._step(reached.step)
            reached.step += 1
            if reached.step % CHECK_EVERY == 0 or reached.step == steps:
                self._check(reached)
            self._observer.step_done(reached.step, steps)
        self._set_best()
        return reached

    def _step(self, number: int) -> None:
        """One step on the windows of its number; the rate falls to 0 along a cosine."""
        for group in self._optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * number / self._config.steps)) / 2
        for part in self._parts(windows_of_step(self._learned, number, self._config.seed)):
            with torch.enable_grad(), substituted(self._variables.parameters()):
                (self._divergence(part) / STEP_WINDOWS).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _parts(self, windows: list[int]) -> Iterator[list[int]]:
        """Yield the windows that are run together: one, or as many as have TUNE_TOKENS tokens."""
        size = max(1, min(STEP_WINDOWS, TUNE_TOKENS // self._windows.shape[1]))
        return (windows[start : start + size] for start in range(0, len(windows), size))

    def _divergence(self, windows: list[int]) -> Tensor:
        """KL(original || model) per token, summed over windows that are run together."""
        ids = self._windows[windows]  # (windows, tokens)
        logits = run_forward(self._network, input_ids=ids, use_cache=False).logits[:, :-1]
        return torch.stack([self._teacher.divergence(i, own) for i, own in zip(windows, logits, strict=True)]).sum()

    @torch.no_grad()
    def held_out_divergence(self) -> float:
        """KL(original || model) per token on the held-out windows; 0 where rounding alone would make it less.

        NaN where a prediction is not finite.
        """
        with substituted(self._variables.parameters()):
            total = sum(float(self._divergence(part)) for part in self._parts(self._held_out))
        mean = total / len(self._held_out)
        return mean if math.isnan(mean) else max(0.0, mean)

    def _check(self, reached: Reached) -> None:
        """Measure, keep the best, and save the state."""
        found = self.held_out_divergence()
        if found < reached.best:
            reached.best, reached.best_step = found, reached.step
            self._best = [x.detach().clone() for x in self._variables.tensors()]
        self._observer.stage(f"KL {found:.5f} after {reached.step} steps, at first {reached.before:.5f}")
        self._save(reached)

    def _save(self, reached: Reached) -> None:
        """Write variables, the best ones and Adam's moments, so that a later run takes the same steps from here on."""
        tensors: dict[str, Tensor] = {}
        for i, (variable, best) in enumerate(zip(self._variables.tensors(), self._best, strict=True)):
            tensors |= {f"{i}.variable": variable.detach(), f"{i}.best": best}
            tensors |= {f"{i}.{moment}": self._optimizer.state[variable][moment] for moment in MOMENTS}
        temporary = self._file.with_suffix(".new")
        said = json.dumps(asdict(reached))
        metadata = {"reached": said, "sha256": _digest(said, tensors)}
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise _system_error(error, temporary) from error
        sync_path(temporary)
        temporary.replace(self._file)

    @torch.no_grad()
    def _open(self) -> Reached:
        """Return how far an earlier run has come, and set the variables and Adam to that; else begin."""
        if self._file.is_file():
            try:
                return self._restore()
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                self._file.unlink()
                self._observer.note(f"{self._file} is damaged ({error}), so all steps are taken again")
        before = self.held_out_divergence()
        if not math.isfinite(before):
            raise InputError(
                "the quantized model or its original predicts NaN or infinity on the calibration windows, so that "
                "nothing can be compared; if both work on them, try --dtype float32"
            )
        return Reached(0, before, before, 0)

    def _restore(self) -> Reached:
        """Raises ValueError, KeyError, OSError or SafetensorError if the file is not as it was written."""
        variables = self._variables.tensors()
        with safe_open(self._file, "pt", str(self._windows.device)) as file:
            about = file.metadata() or {}
            names = [f"{i}.{kind}" for i in range(len(variables)) for kind in ("variable", "best", *MOMENTS)]
            tensors = {name: file.get_tensor(name) for name in names}
        if about["sha256"] != _digest(about["reached"], tensors):
            raise ValueError("its checksum is another one")
        reached = Reached(**json.loads(about["reached"]))
        for i, variable in enumerate(variables):
            variable.copy_(tensors[f"{i}.variable"])
            self._best[i] = tensors[f"{i}.best"]
            moments = {moment: tensors[f"{i}.{moment}"] for moment in MOMENTS}
            step = torch.tensor(float(reached.step), dtype=torch.float32)
            self._optimizer.state[variable] = {"step": step, **moments}
        return reached

    @torch.no_grad()
    def _set_best(self) -> None:
        for variable, best in zip(self._variables.tensors(), self._best, strict=True):
            variable.copy_(best)


def windows_of_step(learned: list[int], number: int, seed: int) -> list[int]:
    """Return the STEP_WINDOWS windows of a step: all of `learned` are taken in a random order, then in another one."""
    turn, place = divmod(number, len(learned) // STEP_WINDOWS)
    draw = torch.Generator().manual_seed((STEP_SEEDS * seed + turn) % SEEDS)
    order = torch.randperm(len(learned), generator=draw).tolist()
    return [learned[i] for i in order[place * STEP_WINDOWS : (place + 1) * STEP_WINDOWS]]


def _system_error(error: SafetensorError, file: Path) -> OSError:
    """Return what the system said of a file, which the library puts into words."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), str(file))
