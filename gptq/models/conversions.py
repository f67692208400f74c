"""Entries for transformers' conversion table that are meant for the tensors of one checkpoint."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming


class StoredNames(WeightRenaming):
    """A renaming for transformers' tables: looks up the names of one checkpoint's tensors."""

    def __init__(self, forward: Mapping[str, str], pairs: Mapping[str, str]) -> None:
        """`forward` maps names to new names; the inverse maps what `pairs` has in both ways."""
        super().__init__("stored name", "name in the model")
        self.forward, self.pairs = dict(forward), dict(pairs)

    def rename_source_key(self, source_key: str) -> tuple[str, None]:
        return self.forward.get(source_key, source_key), None

    def was_used(self) -> bool:
        return True

    def reverse_transform(self) -> "StoredNames":
        back = {new: old for old, new in self.pairs.items()}
        return StoredNames(back, back)


class CheckpointConverter(WeightConverter):
    """A conversion of transformers' table that, on saving, is applied to the tensors of one checkpoint alone.

    transformers searches names for its patterns, and a pattern such as `gate_proj` is found in packed layers' too.
    """

    whole: frozenset[str] = frozenset()  # the tensors that are taken apart on loading or on saving
    saves: bool = False

    @classmethod
    def of(cls, converter: Any, whole: frozenset[str], saves: bool = False) -> "CheckpointConverter":
        """Return a converter like transformers' `converter`."""
        sources, targets = converter._original_source_patterns, converter._original_target_patterns
        own = cls([*sources], [*targets], copy.deepcopy(converter.operations))
        for attribute in ("scope_prefix", "base_model_prefix", "force_cpu"):
            if hasattr(converter, attribute):
                setattr(own, attribute, getattr(converter, attribute))
        own.whole, own.saves = whole, saves
        return own

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed, pattern = super().rename_source_key(source_key)
        if self.saves and self.whole.isdisjoint((source_key, renamed)):
            return source_key, None
        return renamed, pattern

    def reverse_transform(self) -> "CheckpointConverter":
        return self.of(super().reverse_transform(), self.whole, not self.saves)
