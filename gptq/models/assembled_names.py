"""Let transformers load a checkpoint whose files hold tensors under an engine's names (see `checkpoint.assembled`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from gptq.checkpoint.assembled import INDEX_FILE, AssembledSource
from gptq.checkpoint.reader import Source
from gptq.errors import InputError
from gptq.models.conversions import StoredNames
from gptq.models.tensor_names import Names

ROWS_IN_TURN = "rows in turn"  # stands for a pattern, by which transformers finds the converter again


def file_conversions(source: Source, names: Names) -> list[Any]:
    """Return transformers' conversions for loading a model from the files of a checkpoint.

    Args:
        names: of the checkpoint's tensors.
    Raises:
        InputError: the files hold a tensor in a way that transformers cannot undo.
    """
    stored, *converters = names.conversions()
    if not isinstance(source, AssembledSource):
        return [stored, *converters]
    renamed: dict[str, str] = {}
    pairs: dict[str, dict[int, str]] = {}
    for name, place in source.places.items():
        in_model = stored.forward.get(name, name)
        if any(change is not None for change in (place.entry, place.heads, place.added, place.dtype)):
            raise InputError(f"{source.folder / INDEX_FILE}: transformers cannot read {name} there; use gptq.load")
        if place.alternate is None:
            renamed[place.tensor] = in_model
        else:
            pairs.setdefault(place.tensor, {})[place.alternate] = in_model
    wanting = [tensor for tensor, pair in pairs.items() if len(pair) != 2]
    if wanting:
        raise InputError(f"{source.folder / INDEX_FILE} places one tensor in {wanting[0]!r}, which holds two")
    splits = {tensor: (pair[0], pair[1]) for tensor, pair in pairs.items()}
    return [StoredNames({**stored.forward, **renamed}, stored.pairs), RowsInTurn(splits), *converters]


class RowsInTurn(WeightConverter):
    """A conversion for transformers' tables: divides tensors that hold the rows of two others in turn."""

    def __init__(self, pairs: Mapping[str, tuple[str, str]]) -> None:
        """`pairs` maps names in the files to the names in the model of the two tensors."""
        super().__init__(ROWS_IN_TURN, ["first", "second"], [_EveryOtherRow(dict(pairs.values()))])
        self.pairs = dict(pairs)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        pair = self.pairs.get(source_key)
        return (source_key, None) if pair is None else (pair[0], ROWS_IN_TURN)


class _EveryOtherRow(ConversionOps):
    def __init__(self, second: Mapping[str, str]) -> None:
        """`second` maps the name of the tensor with the even rows to that of the other."""
        self.second = dict(second)

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **given: Any
    ) -> dict[str, list[Tensor]]:
        (found,) = input_dict.values()
        whole: Tensor = found[0] if isinstance(found, list) else found  # (2 rows, ...)
        first: str = given["full_layer_name"]
        return {first: [whole[0::2].contiguous()], self.second[first]: [whole[1::2].contiguous()]}
