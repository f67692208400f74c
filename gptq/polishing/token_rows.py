"""TokenRows, the embedding or the output head of a model, of which the rows of some tokens may change.

Both stay in the width that they are stored in, so that rows which make up for errors of the codes cost no byte. Only
tokens of the calibration text can teach their rows anything; memory holds the changes of these.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.models.weights import WeightStream
from gptq.pipeline.tune import ParameterKey


class TokenRows:
    """A matrix (vocabulary, features) plus `change` times its root mean square, in the rows of `tokens`."""

    def __init__(self, name: str, keys: list[ParameterKey], weight: Tensor, tokens: Tensor) -> None:
        """Args:
        name: of the matrix in the model.
        keys: the modules that compute with it; two if the head shares it with the embedding.
        tokens: the rows that may change, (tokens,) integers, each once.
        """  # fmt: skip
        self._name, self._keys, self._weight, self._tokens = name, keys, weight, tokens
        self._size = torch.linalg.vector_norm(weight, dtype=torch.float32) / weight.numel() ** 0.5
        self.change = torch.zeros(
            len(tokens), weight.shape[1], dtype=torch.float32, device=weight.device, requires_grad=True
        )

    def _changed(self, weight: Tensor) -> Tensor:
        """Return `weight`, this matrix in any dtype, with the changes added; gradients reach `change`."""
        rows = weight[self._tokens].float() + self._size * self.change  # (tokens, features)
        return weight.index_copy(0, self._tokens, rows.to(weight.dtype))

    def parameters(self) -> dict[ParameterKey, Tensor]:
        """Return what the modules compute with."""
        return dict.fromkeys(self._keys, self._changed(self._weight))

    @torch.no_grad()
    def stored(self, weights: WeightStream) -> tuple[str, Tensor]:
        """Return the matrix in its stored dtype, other rows as they were, and its name in the checkpoint before it."""
        return weights.to_stored(self._name, self._changed(weights.read(self._name, torch.float32)))


def find_token_rows(network: PreTrainedModel, weights: WeightStream, tokens: Tensor) -> list[TokenRows]:
    """Return the embedding and the output head, as one if they share their weight, unless they have codes.

    Args:
        tokens: the rows that may change, as for `TokenRows`.
    """
    keys: dict[nn.Parameter, list[ParameterKey]] = {}
    for module in (network.get_input_embeddings(), network.get_output_embeddings()):
        weight = None if module is None else module._parameters.get("weight")
        if module is not None and weight is not None and weight.is_floating_point() and weight.ndim == 2:
            keys.setdefault(weight, []).append((module, "weight"))
    names = {parameter: name for name, parameter in network.named_parameters()}  # of a shared one the first
    return [
        TokenRows(names[weight], modules, weight.detach(), tokens)
        for weight, modules in keys.items()
        if weights.is_stored_whole(names[weight])
    ]
