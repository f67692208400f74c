"""What the package reads of a checkpoint is what transformers reads, whatever every weight, bias and buffer holds."""

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq import InputError, QuantConfig, compare, load, perplexity, quantize
from gptq.evaluation.original_logits import compute_logits_by_block, compute_original_logits
from gptq.formats.original import open_original
from gptq.inference.load import tie_weights
from gptq.models.build import open_model, parameters_on_meta
from gptq.models.check_tensors import check_tensors
from gptq.models.weights import WeightStream
from gptq.output import verify
from tests.conftest import ARCHITECTURES, EXPERTS, LLAMA_LIKE, SMALL, VOCAB, MakeModel

FEED_FORWARD = {**SMALL, "intermediate_size": 96}
TWO_STACKS = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
CLIP_TEXT = {**FEED_FORWARD, "num_hidden_layers": 1, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # model type: class and configuration
    "bart": ("BartForConditionalGeneration", TWO_STACKS),
    "marian": ("MarianMTModel", TWO_STACKS),
    "prophetnet": (
        "ProphetNetForConditionalGeneration",
        {"hidden_size": 64, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_encoder_attention_heads": 4,
         "num_decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": VOCAB,
         "max_position_embeddings": 64, "decoder_start_token_id": 1},
    ),
    "deberta": (
        "DebertaForMaskedLM",
        {**FEED_FORWARD, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {**FEED_FORWARD, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "num_labels": 3},
    ),
    "xlnet": ("XLNetLMHeadModel", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": VOCAB}),
    "xlm": ("XLMWithLMHeadModel", {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "n_words": VOCAB}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
         "vocab_size": VOCAB, "max_position_embeddings": 64, "intermediate_size": 96},
    ),
    "funnel": (
        "FunnelForSequenceClassification",
        {"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 96, "vocab_size": VOCAB, "block_sizes": [1, 1],
         "num_decoder_layers": 1, "num_labels": 3},
    ),
    "clip": (
        "CLIPModel", {"text_config": CLIP_TEXT, "vision_config": VISION, "projection_dim": 32},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {**LLAMA_LIKE, "model_type": "llama"}, "image_token_index": 300,
         "vision_config": {**VISION, "projection_dim": 32, "model_type": "clip_vision_model"}},
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {"text_config": {**LLAMA_LIKE, "model_type": "llama"}, "vision_config": VISION, "image_token_id": 300,
         "scale_factor": 2},
    ),
}  # fmt: skip


def random_model(kind: str, **options: Any) -> PreTrainedModel:
    """A tiny model none of whose stored tensors is zero or one."""
    name, own = KINDS.get(kind, ("", {}))
    config = transformers.AutoConfig.for_model(kind, **{**own, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name:
            model: PreTrainedModel = getattr(transformers, name)._from_config(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        computed = model._keys_to_ignore_on_save or ()
        unsaved = {*computed, *(name for name, _ in model.named_non_persistent_buffers())}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and name not in unsaved:
                tensor.data.normal_(0.2, 0.1)
        for module in model.modules():  # transformers makes Funnel's zero when it loads it
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0
    model.eval()
    return model


def inputs_of(kind: str, rng: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, 300, (6, 24), generator=rng)
    if kind in ("bart", "marian", "prophetnet"):
        return {"input_ids": ids[:, :16], "decoder_input_ids": ids[:, 16:]}
    if kind == "clip":
        return {"input_ids": ids[:, :16], "pixel_values": torch.randn(6, 3, 28, 28, generator=rng)}
    return {"input_ids": ids}


def outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        made = model(**inputs)
    found: Tensor = made.logits_per_text if "logits_per_text" in made else made.logits
    return found


def read_whole(folder: Path) -> PreTrainedModel:
    """Read an unquantized checkpoint by the package's own code, block by block and layer by layer as a run does."""
    opened = open_model(open_original(folder), False)
    check_tensors(opened.network, opened.names, opened.source.tensors)
    WeightStream(opened.source, opened.names, torch.device("cpu"), torch.float32).fill(opened.network, "")
    tie_weights(opened.network, opened.names, ())
    return opened.network


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_read_as_transformers_reads_it(kind: str, rng: torch.Generator, tmp_path: Path) -> None:
    model, inputs = random_model(kind), inputs_of(kind, rng)
    model.save_pretrained(tmp_path / "model")
    reference = type(model).from_pretrained(tmp_path / "model").eval()
    own = read_whole(tmp_path / "model")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, own.state_dict()[name]), name
    assert torch.equal(outputs(own, inputs), outputs(reference, inputs))

    out = tmp_path / "out"
    quantize(
        tmp_path / "model", out, QuantConfig(bits=8, group_size=16, effort="fast", format="gptq"), calibration=[inputs]
    )
    assert verify.verify(out).problems == []
    packed, dense = load(out, dtype="float32"), outputs(reference, inputs)
    assert float((outputs(packed, inputs) - dense).norm() / dense.norm()) < 0.02
    for name, tensor in reference.state_dict().items():
        if name in packed.state_dict():
            assert torch.equal(tensor, packed.state_dict()[name]), name


def test_a_cache_in_a_text_model_changes_no_byte(rng: torch.Generator, tmp_path: Path) -> None:
    random_model("llava").save_pretrained(tmp_path / "model")
    config = QuantConfig(bits=3, group_size=32, effort="fast", format="gptq")
    for size in (None, 1):
        quantize(
            tmp_path / "model", tmp_path / f"out{size}", config, calibration=[inputs_of("llava", rng)], batch_size=size
        )
        rng = torch.Generator().manual_seed(1234)
    assert config_says_cache(load(tmp_path / "outNone"))  # the loaded model generates with one
    names = ("model.safetensors", "quantization_record.json")
    assert all((tmp_path / "outNone" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes() for name in names)


def config_says_cache(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config().use_cache)


@pytest.mark.parametrize("copy_of_embedding", [True, False])
def test_a_stored_head_that_config_json_ties(copy_of_embedding: bool, windows: Tensor, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    random_model("llama", **LLAMA_LIKE, tie_word_embeddings=True).save_pretrained(source)
    stored = load_file(source / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    stored["lm_head.weight"] = embedding.clone() if copy_of_embedding else embedding.flip(0).contiguous()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    reference = outputs(transformers.AutoModelForCausalLM.from_pretrained(source), {"input_ids": windows})
    for lm_head in (False, True):
        config = QuantConfig(bits=8, group_size=32, lm_head=lm_head, effort="fast", format="gptq")
        quantize(source, out / str(lm_head), config, calibration=windows)
        found = outputs(load(out / str(lm_head), dtype="float32"), {"input_ids": windows})
        assert float((found - reference).norm() / reference.norm()) < 0.03
    assert transformers.AutoConfig.from_pretrained(out / "True").tie_word_embeddings is False


def test_what_no_checkpoint_holds_is_computed_and_nothing_else(tmp_path: Path) -> None:
    model = random_model("marian")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    opened = open_model(open_original(tmp_path), False)
    positions = {f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}
    assert opened.names.computed.keys() == positions
    assert positions.isdisjoint(stored)
    sines = opened.names.computed["model.encoder.embed_positions.weight"]
    assert float(sines[3, 1]) == pytest.approx(float(torch.sin(torch.tensor(3 / 10000 ** (2 / 64)))), rel=1e-6)
    del stored["model.encoder.layers.0.fc1.bias"]  # would be zero every time, too
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.encoder\.layers\.0\.fc1\.bias"):
        quantize(tmp_path, tmp_path / "out", QuantConfig(method="rtn"))


def test_two_threads_build_models_and_a_third_is_not_disturbed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        random_model("llama", **LLAMA_LIKE, dtype="bfloat16").save_pretrained(tmp_path / name)
        quantize(tmp_path / name, tmp_path / f"{name}-out", QuantConfig(method="rtn", group_size=32))
    inside, may_leave, devices = threading.Event(), threading.Event(), []

    def build_slowly() -> None:
        with parameters_on_meta():
            devices.append(nn.Linear(2, 2).weight.device.type)
            inside.set()
            may_leave.wait(20)

    def load_one(name: str) -> None:
        loaded[name] = load(tmp_path / f"{name}-out", dtype="float32")

    loaded: dict[str, PreTrainedModel] = {}
    threads = [threading.Thread(target=build_slowly)]
    threads[0].start()
    assert inside.wait(20)
    threads += [threading.Thread(target=load_one, args=[name]) for name in ("a", "b")]
    for thread in threads[1:]:
        thread.start()
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # while another thread builds on the meta device
    may_leave.set()
    for thread in threads:
        thread.join()
    assert devices == ["meta"]
    assert (nn.Linear(2, 2).weight.device.type, torch.get_default_dtype()) == ("cpu", torch.float32)
    ids = torch.arange(3, 20)[None]
    again = load(tmp_path / "a-out", dtype="float32")
    for name in ("a", "b"):
        assert torch.equal(outputs(loaded[name], {"input_ids": ids}), outputs(again, {"input_ids": ids}))


JUDGED = ("gpt_neo", "xlnet", "llava", "idefics3", "gpt2", "mixtral")


@pytest.mark.parametrize("kind", JUDGED)
def test_the_original_has_the_same_logits_block_by_block(kind: str, rng: torch.Generator, tmp_path: Path) -> None:
    sizes = {**ARCHITECTURES, **EXPERTS}.get(kind, {})
    random_model(kind, **sizes).save_pretrained(tmp_path)
    tokens, device = torch.randint(3, 300, (2, 12), generator=rng), torch.device("cpu")
    whole = list(compute_original_logits(tmp_path, tokens, device))
    by_block = list(compute_logits_by_block(tmp_path, tokens, device))
    torch.testing.assert_close(by_block, whole, rtol=1e-4, atol=1e-4)


def test_the_judge_does_not_share_a_fault_of_reading(
    make_model: MakeModel, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model(), tmp_path / "out"
    quantize(source, out, QuantConfig(method="rtn", bits=8, group_size=16))
    right = compare(out, source, text_file, seq_len=16, windows=2)
    read = WeightStream.read

    def read_wrongly(self: WeightStream, name: str, *args: Any) -> Tensor:
        return read(self, name, *args) * (2 if name == "model.norm.weight" else 1)

    monkeypatch.setattr(WeightStream, "read", read_wrongly)
    wrong = compare(out, source, text_file, seq_len=16, windows=2)
    assert wrong.original_perplexity == right.original_perplexity
    assert wrong.kl > 100 * right.kl


def test_two_stacks_are_measured_in_no_way(make_model: MakeModel, text_file: str, tmp_path: Path) -> None:
    source, out = make_model("t5"), tmp_path / "out"
    quantize(source, out, QuantConfig(method="rtn"))
    for measure in (perplexity, partial(compare, original=source)):
        with pytest.raises(InputError, match="no causal language model"):
            measure(out, data=text_file, seq_len=16, windows=2)
