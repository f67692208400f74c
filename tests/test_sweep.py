"""Tensors that transformers joins or divides on loading, beside packed experts; `scripts/sweep_architectures.py`."""

from pathlib import Path

import pytest
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gptq.checkpoint.reader import Source
from gptq.models.conversions import CheckpointConverter
from tests.conftest import load_script

sweep = load_script("sweep_architectures")
PACKED = {  # architecture: where a mixture of experts is, names of an expert's layers, other packed layers
    "minimax_m3_vl": (
        "language_model.model.layers.0.block_sparse_moe.", ("w1", "w2", "w3"), {"shared_experts.down_proj"},
    ),
    "qwen3_omni_moe_thinker": ("model.layers.0.mlp.", ("gate_proj", "up_proj", "down_proj"), set()),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACKED)
def test_every_expert_is_packed_and_from_pretrained_computes_and_saves_the_same(kind: str, tmp_path: Path) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip("this release of transformers does not know the architecture")
    built = sweep.build_and_save(kind, "AutoModelForImageTextToText", tmp_path / "model")
    assert not isinstance(built, str), built
    assert sweep.outcome(built, tmp_path / "model", tmp_path / "out", "gptq")[0] == "fine"
    mixture, parts, others = PACKED[kind]
    stored = {name.removeprefix(mixture) for name in Source(tmp_path / "out").tensors if name.startswith(mixture)}
    packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    assert packed == {f"experts.{i}.{part}" for i in range(4) for part in parts} | others
    if others:  # transformers joins these two, so they stay
        assert {"shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"} <= stored


def test_saving_joins_what_loading_has_divided_and_nothing_else() -> None:
    theirs = WeightConverter("w13", ["gate_proj", "up_proj"], [Chunk(dim=1)])
    own = CheckpointConverter.of(theirs, frozenset({"mlp.shared.w13"}))
    packed = "mlp.experts.0.gate_proj.g_idx"
    assert theirs.reverse_transform().rename_source_key(packed)[1] == "gate_proj"  # which is the fault
    assert own.reverse_transform().rename_source_key(packed) == (packed, None)
    assert own.reverse_transform().rename_source_key("mlp.shared.gate_proj") == ("mlp.shared.w13", "gate_proj")
    again = own.reverse_transform().reverse_transform()
    for converter in (theirs, own, again):
        assert converter.rename_source_key("mlp.shared.w13") == ("mlp.shared.gate_proj", "w13")
