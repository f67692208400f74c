"""Small valid inputs of every kind that the package reads, for `fuzz_readers.py` to change.

Each is a folder, called KIND/NAME: model/gptq is a checkpoint, data/chats a folder with calibration data. Layouts of
other tools are filled with random codes: any bits are valid ones.
"""

import json
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from gptq import PolishConfig, QuantConfig, polish, quantize
from gptq.checkpoint.ggml import BLOCK_TYPES
from gptq.formats.gguf_file import explain_missing
from gptq.pipeline.run import Observer
from gptq.polishing import descent

TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds. " * 40
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "format": "gptq"},
    "gptq_v2": {"bits": 3, "format": "gptq_v2", "sym": False},
    "pack": {"bits": 5, "format": "pack-quantized", "sym": False},
    "mixed": {"bits": 4, "format": "gptq", "overrides": [["down_proj", {"bits": 8}], ["o_proj", {"skip": True}]]},
    "wide": {"bits": 4, "format": "gptq", "group_size": 32, "overrides": [["down_proj", {"skip": True}]]},
    "gguf": {"bits": 4, "format": "gguf", "group_size": 32, "overrides": [["down_proj", {"skip": True}]]},
    "nvfp4": {"format": "nvfp4-pack-quantized"},
    "mxfp4": {"format": "mxfp4-pack-quantized", "group_size": 32, "overrides": [["down_proj", {"skip": True}]]},
    "fp8": {"format": "fp8", "group_size": 128},
    "mlx": {"bits": 4, "group_size": 32, "format": "mlx", "sym": False, "overrides": [["down_proj", {"skip": True}]]},
    "gguf-k": {"bits": 4, "format": "gguf-k", "group_size": 32},
    "gguf-iq4": {"bits": 4, "format": "gguf-iq4", "group_size": 32, "overrides": [["down_proj", {"skip": True}]]},
    "a8": {"bits": 4, "format": "pack-quantized-a8"},
    "float8": {"format": "float-quantized", "group_size": -1},
    "int8": {"bits": 8, "group_size": -1, "format": "int-quantized"},
    "mixed-pack": {"bits": 4, "format": "pack-quantized", "overrides": [["down_proj", {"bits": 8, "group_size": 16}]]},
}
RESUMED = QuantConfig(group_size=16, seq_len=16, num_samples=2, format="gptq")  # of the run that is gone on with
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class _StopError(Exception):
    pass


class _Stops(Observer):
    """Stops a run in its second block, or after three steps of polishing."""

    def layer_done(self, block: int, name: str, weights: int) -> None:
        if block:
            raise _StopError

    def step_done(self, done: int, total: int) -> None:
        if done == 3:
            raise _StopError


def make_seeds(folder: Path) -> dict[str, Path]:
    """Make all inputs; return their folders by name."""
    found = {f"model/{name}": make_checkpoint(name, folder / "model") for name in all_checkpoints()}
    plain = found["model/plain"]
    for kind, make in (
        ("data", make_data),
        ("media", make_media),
        ("gguf", make_gguf),
        ("pickle", lambda at: make_pickles(plain, at)),
        ("pickled", lambda at: make_pickled_model(plain, at)),
        ("journal", make_journal),
        ("polish", make_polish),
        ("lenet", make_lenet),
    ):
        found |= {f"{kind}/{name}": path for name, path in make(folder / kind).items()}
    return found


# --- checkpoints ------------------------------------------------------------------------------------------------------


PLAIN: dict[str, dict[str, Any]] = {  # not quantized: what their models are
    "plain": {"kind": "llama"},
    "shards": {"kind": "llama", "max_shard_size": "30KB", "tie_word_embeddings": True},
    "broad": {"kind": "llama", "hidden_size": 256, "intermediate_size": 256, "vocab_size": 260},  # for K-quants
    "experts": {"kind": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt-oss": {
        "kind": "gpt_oss",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
        "head_dim": 16,
    },
}
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "quantized-experts": {},
    "stacked-experts": {"group_size": 32, "format": "mlx", "overrides": [["down_proj", {"skip": True}]]},
}
BASES = {"gguf-k": "broad"}  # what is quantized, where it is not "plain"
BLOCKS = "gpt-oss-mxfp4"
MEASURED = {"perplexity": 300.5, "original_perplexity": 290.1, "data": "a.txt", "windows": 3, "seq_len": 16, "kl": 0.1,
            "intervals": {"kl": [0.05, 0.2]}}  # fmt: skip


def make_checkpoint(name: str, folder: Path) -> Path:
    """Make the checkpoint `name` in `folder`, and what it is made of, unless they are there; return its folder."""
    made = folder / name
    if made.exists():
        return made
    if name in PLAIN:
        return _model(made, **PLAIN[name])
    if name in LAYOUTS:
        return _make_layout(name, folder)
    if name == BLOCKS:
        return _make_blocks(name, folder)
    if name in RENAMED:
        return _make_renamed(name, folder)
    source, recipe = ("experts", OF_EXPERTS[name]) if name in OF_EXPERTS else (BASES.get(name, "plain"), RECIPES[name])
    config = QuantConfig.from_dict({"method": "rtn", "group_size": 16, **recipe})
    quantize(make_checkpoint(source, folder), made, config)
    (made / "quality.json").write_text(json.dumps({"measurements": [MEASURED]}))
    return made


def all_checkpoints() -> list[str]:
    """Return the names of the checkpoints that can be made here."""
    names = [*PLAIN, *RECIPES, *OF_EXPERTS, *LAYOUTS, BLOCKS, *RENAMED]
    return [name for name in names if not name.startswith("gguf") or not explain_missing()]


def _model(folder: Path, kind: str, max_shard_size: str = "5GB", **options: Any) -> Path:
    """Make a tiny random model and its tokenizer."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **small | options, bos_token_id=0, eos_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=max_shard_size)
    _tokenizer().save_pretrained(folder)
    if max_shard_size != "5GB":  # and what a folder may hold besides
        for name in ("additional_chat_templates/a.jinja", "1_Pooling/config.json", "extra.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
    return folder


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")
    made.chat_template = CHAT_TEMPLATE
    return made


def _bytes(shape: tuple[int, ...], highest: int = 256) -> Tensor:
    return torch.randint(0, highest, shape, dtype=torch.uint8)


def _fp8_blocks(rows: int, columns: int) -> dict[str, Tensor]:
    scales = torch.rand(-(-rows // 16), -(-columns // 16))
    return {"weight": _bytes((rows, columns), 120).view(torch.float8_e4m3fn), "weight_scale_inv": scales}


def _fp8_tensor(rows: int, columns: int) -> dict[str, Tensor]:
    codes = _bytes((rows, columns), 120).view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": torch.rand(()), "input_scale": torch.rand(())}


def _fp8_channel(rows: int, columns: int) -> dict[str, Tensor]:
    codes = _bytes((rows, columns), 120).view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": torch.rand(rows, 1).bfloat16()}


def _nvfp4(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "weight_packed": _bytes((rows, columns // 2)),
        "weight_scale": _bytes((rows, columns // 16), 120).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.rand(1) + 1,
    }


def _modelopt(rows: int, columns: int) -> dict[str, Tensor]:
    made = _nvfp4(rows, columns)
    return {
        "weight": made["weight_packed"], "weight_scale": made["weight_scale"], "weight_scale_2": torch.rand(()),
        "input_scale": torch.tensor(0.25),
    }  # fmt: skip


def _awq(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "qweight": _bytes((columns, rows // 2)).view(torch.int32),
        "qzeros": _bytes((columns // 16, rows // 2)).view(torch.int32),
        "scales": torch.rand(columns // 16, rows).half(),
    }


def _float_weights(form: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {
    "quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False, "data_type": "int",
    "packing_format": "auto_round:auto_awq", "autoround_version": "0.16.1", "extra_config": {},
    "block_name_to_quantize": "model.layers",
}  # fmt: skip
LAYOUTS: dict[str, tuple[Callable[[int, int], dict[str, Tensor]], dict[str, Any]]] = {
    "fp8-block": (_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}),
    "fp8-tensor": (_fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8-channel": (_fp8_channel, _float_weights("float-quantized", strategy="channel")),
    "nvfp4-source": (
        _nvfp4, _float_weights("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)),
    "modelopt": (_modelopt, {}),
    "awq": (_awq, AWQ),
    "auto-round-awq": (_awq, AUTO_ROUND),
}  # fmt: skip


RENAMED: dict[
    str, tuple[str, dict[str, Any], bool]
] = {  # our file without g_idx: which, what is said, and in config.json
    "autogptq": ("gptq", {"bits": 4, "group_size": 16, "sym": True, "desc_act": False}, False),
    "auto-round": (
        "gptq_v2",
        {
            **AUTO_ROUND,
            "bits": 3,
            "packing_format": "auto_round",
            "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 3}, ".*down_proj.*": {"group_size": 16}},
        },
        True,
    ),
}


def _make_layout(name: str, folder: Path) -> Path:
    """Make a checkpoint of random codes in another tool's layout."""
    torch.manual_seed(0)
    layout, config = LAYOUTS[name]
    plain = make_checkpoint("plain", folder)
    tensors: dict[str, Tensor] = {}
    for key, W in load_file(plain / "model.safetensors").items():
        parts = layout(*W.shape) if key.endswith("proj.weight") else {"weight": W}
        tensors |= {key.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}
    made = _foreign(plain, folder / name, tensors, config)
    if not config:
        said = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}
        (made / "hf_quant_config.json").write_text(json.dumps(said))
    return made


def _make_blocks(name: str, folder: Path) -> Path:
    """Make a checkpoint of gpt-oss's kind, whose experts are blocks of MXFP4."""
    plain = make_checkpoint("gpt-oss", folder)
    tensors = load_file(plain / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = _bytes((experts, rows, columns // 32, 16))
        tensors[f"{key}_scales"] = _bytes((experts, rows, columns // 32), 140)
    return _foreign(plain, folder / name, tensors, {"quant_method": "mxfp4"})


def _make_renamed(name: str, folder: Path) -> Path:
    """Make a checkpoint of our words as another tool describes them."""
    base, said, within = RENAMED[name]
    tensors = load_file(make_checkpoint(base, folder) / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("g_idx")}
    made = _foreign(make_checkpoint("plain", folder), folder / name, kept, said if within else {})
    if not within:
        (made / "quantize_config.json").write_text(json.dumps(said))
    return made


def _foreign(plain: Path, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    shutil.copytree(plain, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values |= {"quantization_config": config} if config else {}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# --- other files ------------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> dict[str, Path]:
    """Make calibration data without media, one file in each folder."""
    turns = [{"role": "user", "content": TEXT[:40]}, {"role": "assistant", "content": TEXT[:90]}]
    parts = [{"role": "user", "content": [{"type": "text", "text": TEXT[:40]}]}, turns[1]]
    rows: dict[str, list[dict[str, Any]]] = {
        "rows.jsonl": [{"text": TEXT[:600]}] * 4,
        "chats.jsonl": [{"messages": turns}, {"messages": parts}] * 3,
        "conversations.jsonl": [{"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": TEXT}]}],
        "prompts.jsonl": [{"prompt": turns[:1], "completion": turns[1:]}] * 4,
        "instructions.jsonl": [{"instruction": TEXT[:30], "input": "x", "output": TEXT[:90]}] * 4,
    }
    found = {name: folder / name for name in (*rows, "a.txt", "a.json", "a.csv", "a.parquet", "a.npz", "a.safetensors")}
    for path in found.values():
        path.mkdir(parents=True)
    for name, lines in rows.items():
        (found[name] / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found["a.txt"] / "a.txt").write_text(TEXT)
    (found["a.json"] / "a.json").write_text(json.dumps([{"text": TEXT[:600]}] * 4))
    (found["a.csv"] / "a.csv").write_text("text,label\n" + f'"{TEXT[:600]}",1\n' * 4)
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT[:600]] * 4}), found["a.parquet"] / "a.parquet")
    ids = np.arange(64, dtype=np.int64).reshape(4, 16) + 3
    np.savez(found["a.npz"] / "a.npz", input_ids=ids, attention_mask=np.ones((4, 16), np.int64))
    save_file({"input_ids": torch.from_numpy(ids)}, found["a.safetensors"] / "a.safetensors")
    return found


def make_media(folder: Path) -> dict[str, Path]:
    """Make folders of images and of sound, beside the processor that reads them."""
    found = {name: folder / name for name in ("images", "sound", "pictures.parquet")}
    for path in found.values():
        path.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(found["images"] / f"{number}.png")
        Image.fromarray(picture).save(found["images"] / f"{number}.jpg")
    lines = [{"file_name": name, "text": "a fox"} for name in ("0.png", "1.png", "0.jpg", "1.jpg")]
    (found["images"] / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with wave.open(str(found["sound"] / "0.wav"), "wb") as recording:
        recording.setparams((1, 2, 16_000, 800, "NONE", ""))
        recording.writeframes(pixels.tobytes()[:1600])
    (found["sound"] / "metadata.jsonl").write_text(json.dumps({"file_name": "0.wav"}) + "\n")
    table = pyarrow.table({"image": [{"bytes": (found["images"] / "0.png").read_bytes(), "path": None}] * 2})
    pyarrow.parquet.write_table(table, found["pictures.parquet"] / "pictures.parquet")
    return found


def make_processors(folder: Path) -> dict[str, Path]:
    """Make folders with a model's config.json and its processor: of images, and of sound."""
    small: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    }  # fmt: skip
    made = {"images": folder / "vit", "sound": folder / "encodec"}
    made["pictures.parquet"] = made["images"]
    transformers.ViTConfig(**small, image_size=16, patch_size=8).save_pretrained(made["images"])
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(made["images"])
    transformers.EncodecConfig().save_pretrained(made["sound"])
    transformers.EncodecFeatureExtractor(sampling_rate=16_000).save_pretrained(made["sound"])
    return made


def make_gguf(folder: Path) -> dict[str, Path]:
    """Make a GGUF file with a tensor of each type that is read, and a key of each kind of value."""
    if explain_missing():
        return {}
    import gguf

    folder = folder / "types"
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_custom_alignment(32)
    writer.add_uint32("a.u32", 7)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "fox")
    writer.add_array("a.texts", ["a", "bc", "def"])
    writer.add_array("a.numbers", [1, 2, 3])
    draw = np.random.default_rng(0)
    for name, kind in sorted(BLOCK_TYPES.items()):
        rows = draw.integers(0, 100, (2, kind.row_bytes(256)), np.uint8)
        writer.add_tensor(f"{name}.weight", rows, raw_dtype=gguf.GGMLQuantizationType(kind.number))
    writer.add_tensor("plain.weight", draw.standard_normal((2, 32)).astype(np.float32))
    writer.add_tensor("half.weight", draw.standard_normal((2, 3, 32)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"types": folder}


def make_pickles(plain: Path, folder: Path) -> dict[str, Path]:
    """Make pickled checkpoints: as torch writes them now, as it did before 1.6, and in two files with an index."""
    folder.mkdir(parents=True)
    tensors = {"a.weight": torch.randn(4, 8), "b.bias": torch.randn(4).half(), "c": torch.arange(3)}
    tensors["tied"] = tensors["a.weight"]
    found = {}
    for name in ("zip", "old", "shards"):
        found[name] = folder / name
        found[name].mkdir()
        shutil.copy(plain / "config.json", found[name])
        if name == "shards":
            shard_of = {key: f"pytorch_model-{i}.bin" for i, key in enumerate(("a.weight", "b.bias"))}
            for key, file in shard_of.items():
                torch.save({key: tensors[key]}, found[name] / file)
            (found[name] / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))
        else:
            torch.save(tensors, found[name] / "pytorch_model.bin", _use_new_zipfile_serialization=name == "zip")
    return found


def make_pickled_model(plain: Path, folder: Path) -> dict[str, Path]:
    """Make a model whose weights torch has pickled."""
    made = folder / "model"
    shutil.copytree(plain, made, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(plain / "model.safetensors"), made / "pytorch_model.bin")
    return {"model": made}


def make_journal(folder: Path) -> dict[str, Path]:
    """Make the OUT.partial of a run that stopped in its second block; beside it the model, and `whole`, its result."""
    plain, windows = _model(folder / "plain", kind="llama", num_hidden_layers=2), torch.arange(32).reshape(2, 16) + 3
    quantize(plain, folder / "whole", RESUMED, calibration=windows, device="cpu")
    try:
        quantize(plain, folder / "out", RESUMED, calibration=windows, device="cpu", observer=_Stops())
    except _StopError:
        (folder / "out.partial").rename(folder / "stopped")
    return {"stopped": folder / "stopped"}


def polish_again(folder: Path, out: Path, observer: Observer | None = None) -> None:
    """Polish the quantized model in `folder` with few steps, of which every other one is saved."""
    options = PolishConfig(steps=6, num_samples=8, seq_len=16)
    windows = torch.arange(128).reshape(8, 16) + 3
    every, descent.CHECK_EVERY = descent.CHECK_EVERY, 2
    try:
        arguments: dict[str, Any] = {"calibration": windows, "device": "cpu", "observer": observer}
        polish(folder / "quantized", folder / "plain", out, options, **arguments)
    finally:
        descent.CHECK_EVERY = every


def make_polish(folder: Path) -> dict[str, Path]:
    """Make the OUT.partial of a polishing that stopped; beside it the models, and `whole`, its result."""
    plain = _model(folder / "plain", kind="llama")
    quantize(plain, folder / "quantized", QuantConfig(method="rtn", bits=2, group_size=16, format="gptq"))
    polish_again(folder, folder / "whole")
    try:
        polish_again(folder, folder / "out", _Stops())
    except _StopError:
        (folder / "out.partial").rename(folder / "polishing")
    return {"polishing": folder / "polishing"}


def make_lenet(folder: Path) -> dict[str, Path]:
    """Make a LeNet that saw no training, the same in int8, and the results of comparing both on random images."""
    try:
        from lenet_baseline import compare
    except ModuleNotFoundError:
        return {}
    from lenet_baseline.activations import record_activations
    from lenet_baseline.data import Data, Images
    from lenet_baseline.integer import quantize_lenet, save_integers
    from lenet_baseline.model import load

    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.arange(40) % 10)
    out = folder / "out"
    compare.compare(Data("noise", images, images, flips=False, epochs=1, batch_size=20), out, "all", 1, 1)
    trained = next(out.rglob("*.safetensors")).rename(out / "float.safetensors")
    model = load(trained)
    activations = record_activations(model, images.draw(8, 0))
    save_integers(quantize_lenet(model, activations, "max-abs", True), out / "int8.safetensors")
    return {"out": out}
