"""GGUF: blocks bit for bit as the package gguf reads them, whole files as transformers reads them, and back again."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gptq import InputError, QuantConfig, convert, load, quantize
from gptq.checkpoint.assembled import INDEX_FILE, open_source
from gptq.checkpoint.ggml import BLOCK_TYPES, BlockType
from gptq.checkpoint.gguf import read_gguf_header
from gptq.checkpoint.tensors import TensorInfo
from gptq.config import Format
from gptq.formats import gguf_architectures, gguf_tokenizer
from gptq.formats.gguf_architectures import ARCHITECTURES, extra_tensors
from gptq.formats.gguf_rounding import round_rows
from gptq.formats.gguf_tokenizer import SPLITS
from gptq.output import verify
from gptq.output.record import read_record
from gptq.planning.plan import plan_checkpoint
from tests.conftest import MakeModel

gguf = pytest.importorskip("gguf")
RTN: dict[str, Any] = {"method": "rtn"}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}  # K-quants take 256 inputs at a time


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_vector_of_blocks_and_an_entry_of_a_matrix_are_read(tmp_path: Path, rng: torch.Generator) -> None:
    rows = torch.randn(4, 64, generator=rng).numpy()
    made = gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.add_tensor("vector", made[0], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("matrix", made, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = {"a": {"tensor": "vector", "dtype": "F32"}, "b": {"tensor": "matrix", "entry": 1, "dtype": "F32"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"files": ["model.gguf"], "tensors": tensors}))
    source, expected = open_source(tmp_path), gguf.dequantize(made, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(source.read("a"), torch.from_numpy(expected[0]))
    assert torch.equal(source.read("b"), torch.from_numpy(expected[1]))


# --- blocks -----------------------------------------------------------------------------------------------------------


def random_blocks(kind: BlockType, rng: torch.Generator) -> torch.Tensor:
    """Rows of two blocks with any bytes, but finite scales, (7, bytes of two blocks)."""
    rows = torch.randint(0, 256, (7, 2 * kind.nbytes), dtype=torch.uint8, generator=rng)
    found = kind.unpack(rows)
    d, m = (None if x is None else x.where(torch.isfinite(x), torch.ones_like(x)) for x in (found.d, found.m))
    assert d is not None
    return kind.pack(replace(found, d=d, m=m))


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=list(BLOCK_TYPES))
def test_blocks_are_what_the_package_gguf_reads(kind: BlockType, rng: torch.Generator) -> None:
    number = gguf.GGMLQuantizationType[kind.name]
    assert (number, gguf.GGML_QUANT_SIZES[number]) == (kind.number, (kind.inputs, kind.nbytes))
    rows = random_blocks(kind, rng)
    assert torch.equal(kind.pack(kind.unpack(rows)), rows)
    found = kind.dequantize(rows)
    assert np.array_equal(found.numpy(), gguf.quants.dequantize(rows.numpy(), number))
    assert found.shape == (7, 2 * kind.inputs)
    assert kind.row_bytes(2 * kind.inputs) == rows.shape[1]


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K"])
def test_an_embedding_is_rounded_to_within_half_a_step(name: str, rng: torch.Generator) -> None:
    kind, W = BLOCK_TYPES[name], torch.randn(5, 512, generator=rng)
    W[2, :256] = 0
    off = (kind.dequantize(round_rows(W, kind)) - W).abs().unflatten(1, (-1, kind.group)).amax(-1)
    step = W.unflatten(1, (-1, kind.group)).abs().amax(-1) / (kind.offset - 1)
    coarse = step.unflatten(1, (-1, kind.inputs // kind.group)).amax(-1).repeat_interleave(kind.inputs // kind.group, 1)
    slack = coarse / 127 if kind.inputs > kind.group else 0 * coarse  # scales are integers from 1 to 127
    assert bool((off <= 0.502 * (step + slack) + 1e-9).all())


# --- whole files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"format": "gguf", "bits": 4}, {}),
        ({"format": "gguf", "bits": 3, "group_size": 64, "overrides": [["down", {"bits": 5, "group_size": 32}]]}, {}),
        ({"format": "gguf", "bits": 4, "sym": False, "overrides": [["v_proj", {"bits": 8, "sym": True}]]}, {}),
        ({"format": "gguf-iq4", "bits": 4}, {}),
        ({"format": "gguf-k", "overrides": [["down", {"bits": 6}], ["o_pr", {"bits": 3}], ["up", {"bits": 2}]]}, WIDE),
    ],
    ids=["Q4_0", "wide groups", "Q4_1", "IQ4_NL", "K"],
)  # fmt: skip
def test_transformers_reads_the_tensors_that_were_chosen(
    options: dict[str, Any], shape: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(make_model("llama", dtype=torch.bfloat16, **shape), out, QuantConfig.from_dict({**RTN, **options}))
    assert verify.verify(out).problems == []  # every layer unpacks to the weight that was chosen for it
    assert verify.inspect(out).format == options["format"]
    read = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    ours = load(out, dtype="float32")
    for layer in read_record(out).layers:
        weight = ours.get_submodule(str(layer.name)).weight
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(read[f"{layer.stored}.weight"], weight), layer.stored
    others = {name: p for name, p in ours.state_dict().items() if "weight_ggml" not in name}
    assert others.keys() >= {"model.norm.weight", "model.embed_tokens.weight"}
    assert all(torch.equal(read[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_from_gptq_and_back_are_the_same_bytes(bits: int, make_model: MakeModel, tmp_path: Path) -> None:
    first: Format = "gptq" if bits != 5 else "pack-quantized"
    config = QuantConfig.from_dict({**RTN, "bits": bits, "group_size": 32, "format": first})
    quantize(make_model("llama", dtype=torch.bfloat16), tmp_path / "a", config)
    convert(tmp_path / "a", tmp_path / "b", "gguf")
    assert verify.verify(tmp_path / "b").problems == []
    assert not list((tmp_path / "b").glob("*.safetensors"))
    kinds = {s.blocks.name for s in read_gguf_header(tmp_path / "b" / "model.gguf").tensors.values() if s.blocks}
    assert kinds == {"Q4_0" if bits <= 4 else {5: "Q5_0", 8: "Q8_0"}[bits]}
    convert(tmp_path / "b", tmp_path / "c", first)
    assert all_bytes(tmp_path / "c") == all_bytes(tmp_path / "a")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "qwen2", "qwen3", "mistral"])
def test_architectures_come_back_as_they_were(kind: str, make_model: MakeModel, tmp_path: Path) -> None:
    own = {"query_pre_attn_scalar": 16} if kind.startswith("gemma") else {}
    source = make_model(kind, dtype=torch.bfloat16, **own)
    quantize(source, tmp_path / "a", QuantConfig.from_dict({**RTN, "bits": 4, "group_size": 32, "format": "gptq"}))
    convert(tmp_path / "a", tmp_path / "b", "gguf")
    convert(tmp_path / "b", tmp_path / "c", "gptq")
    assert all_bytes(tmp_path / "c") == all_bytes(tmp_path / "a")
    header = read_gguf_header(tmp_path / "b" / "model.gguf")
    arch = ARCHITECTURES[json.loads((source / "config.json").read_text())["model_type"]].name
    assert header.values["general.architecture"] == arch
    assert header.values[f"{arch}.block_count"] == 2
    stacked = [s.info.shape[0] for n, s in header.tensors.items() if n.endswith("_exps.weight")]
    assert stacked == ([4] * 6 if kind in ("mixtral", "qwen3_moe") else [])
    norm = gguf.GGUFReader(tmp_path / "b" / "model.gguf").get_tensor(0)
    assert norm.name
    if kind.startswith("gemma"):
        in_file = next(
            t for t in gguf.GGUFReader(tmp_path / "b" / "model.gguf").tensors if t.name == "output_norm.weight"
        )
        checkpoint = open_source(tmp_path / "a").read("model.norm.weight", torch.float32)
        assert np.array_equal(in_file.data, checkpoint.numpy() + 1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("opt", {}, "not known how llama.cpp stores model_type 'opt'"),
        ("llama", {"hidden_act": "relu"}, "llama.cpp runs llama models with silu, and config.json says relu"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "scales attention by 16"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob true"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_would_not_run_so_is_refused(
    kind: str, options: dict[str, Any], message: str, make_model: MakeModel, tmp_path: Path
) -> None:
    config = QuantConfig.from_dict({**RTN, "format": "gguf"})
    with pytest.raises(InputError, match=message):
        quantize(make_model(kind, **options), tmp_path / "out", config)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gguf", "bits": 8, "sym": False}, "no type for asymmetric 8 bits"),
        ({"format": "gguf", "group_size": 48}, "groups of 32 inputs or multiples of it, not of 48"),
        ({"format": "gguf-k"}, "blocks of 256 inputs, which do not divide the 64 inputs"),
        ({"format": "gguf-k", "bits": 8}, "no type for symmetric 8 bits"),
        ({"format": "gguf-iq4", "bits": 3}, "no type for symmetric 3 bits"),
    ],
)  # fmt: skip
def test_what_no_block_holds_is_refused(
    options: dict[str, Any], message: str, make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        quantize(make_model("llama"), tmp_path / "out", QuantConfig.from_dict({**RTN, **options}))


def test_grids_of_different_kinds_are_not_converted(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama")
    config = {**RTN, "sym": False, "group_size": 32}
    quantize(source, tmp_path / "zeros", QuantConfig.from_dict({**config, "format": "gptq_v2"}))
    quantize(source, tmp_path / "minima", QuantConfig.from_dict({**config, "format": "gguf"}))
    with pytest.raises(InputError, match="rounds to other values; quantize the original with --format gguf"):
        convert(tmp_path / "zeros", tmp_path / "out", "gguf")
    with pytest.raises(InputError, match="rounds to other values; quantize the original with --format gptq_v2"):
        convert(tmp_path / "minima", tmp_path / "out", "gptq_v2")


def test_the_rotation_of_llama_3_is_a_tensor_of_the_file(make_model: MakeModel) -> None:
    """Dividing the plain frequencies by the tensor gives those that transformers computes."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(make_model("llama", head_dim=64, rope_parameters=rope))
    factors = extra_tensors(model.config)["rope_freqs.weight"]
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    assert len(set(factors.tolist())) > 3
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)


def test_the_head_goes_through_the_solver_and_sizes_are_known_before(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("llama", tie_word_embeddings=True)
    config = QuantConfig.from_dict({**RTN, "format": "gguf", "lm_head": True})
    planned = plan_checkpoint(str(source), config, None, False).file_bytes
    made = quantize(source, tmp_path / "out", config)
    assert made.bytes_after <= planned < made.bytes_after + 10_000
    assert made.bytes_after == (tmp_path / "out" / "model.gguf").stat().st_size
    blocks = {name: s.blocks for name, s in read_gguf_header(tmp_path / "out" / "model.gguf").tensors.items()}
    assert blocks["output.weight"] is BLOCK_TYPES["Q4_0"]
    assert blocks["token_embd.weight"] is BLOCK_TYPES["Q8_0"]
    assert verify.verify(tmp_path / "out").problems == []


# --- tokenizers -------------------------------------------------------------------------------------------------------


def save_tokenizer(bpe: Tokenizer, folder: Path) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>").save_pretrained(folder)
    return folder


def split_by(expression: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level])


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), False, "smollm"),
        *((split_by(split[0]), True, name) for split, name in SPLITS.items() if len(split) == 1 and "\\" in split[0]),
        (split_by(next(split[0] for split, name in SPLITS.items() if name == "llama-bpe")), False, "dbrx"),
        (split_by(r"\w+"), False, None),
    ],
)  # fmt: skip
def test_the_split_has_a_name(steps: Any, ignore_merges: bool, name: str | None, tmp_path: Path) -> None:
    bpe = Tokenizer(
        models.BPE({"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "ab": 4}, [("a", "b")], ignore_merges=ignore_merges)
    )
    bpe.pre_tokenizer = steps
    folder = save_tokenizer(bpe, tmp_path / "t")
    if name is None:
        with pytest.raises(InputError, match="splits text by"):
            dict(gguf_tokenizer.list_keys(folder, 6))
        return
    keys = dict(gguf_tokenizer.list_keys(folder, 6))
    assert (keys["ggml.model"], keys["ggml.pre"]) == ("gpt2", name)
    assert keys["ggml.tokens"] == ["<unk>", "<s>", "a", "b", "ab", "[PAD5]"]
    assert keys["ggml.token_type"] == [3, 3, 1, 1, 1, 5]
    assert keys["ggml.merges"] == ["a b"]


def test_sentencepiece_merges_become_scores(tmp_path: Path) -> None:
    """The earlier a token is merged, the higher its score; whichever merge makes it."""
    vocabulary = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "ab": 5, "aba": 6, "\u2581a": 7, "\u2581": 8}
    merges = [("a", "b"), ("\u2581", "a"), ("ab", "a")]
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    keys = dict(gguf_tokenizer.list_keys(save_tokenizer(bpe, tmp_path / "t"), 9))
    assert (keys["ggml.model"], keys["ggml.pre"], keys["ggml.add_space_prefix"]) == ("llama", "default", True)
    assert keys["ggml.token_type"] == [2, 3, 6, 1, 1, 1, 1, 1, 1]
    assert keys["ggml.scores"][3:] == [0.0, 0.0, -1.0, -3.0, -2.0, 0.0]
    assert keys["ggml.unknown_token_id"] == 0


# --- files of strangers -----------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str = "w", shape: tuple[int, ...] = (32, 2), kind: int = 2, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def whole(keys: list[bytes], tensors: list[bytes], data: int = 64, counts: tuple[int, int] | None = None) -> bytes:
    """A file with these entries; `counts` are the numbers of tensors and keys that it announces."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


KEYS = [
    text("general.architecture") + struct.pack("<I", 8) + text("llama"),
    text("a.number") + struct.pack("<If", 6, 0.5),
    text("a.list") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yz"),
    text("a.row") + struct.pack("<IIQ3i", 9, 5, 3, 1, 2, 3),
]


def test_a_header_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(whole(KEYS, [tensor(), tensor("v", (3,), 0, 64)], data=96))
    header = read_gguf_header(file)
    assert header.values == {"general.architecture": "llama", "a.number": 0.5}
    assert header.lengths == {"a.list": 2, "a.row": 3}
    found = {name: (s.info, s.begin, s.floats) for name, s in header.tensors.items()}
    begin = file.stat().st_size - 96
    assert found["w"] == (TensorInfo(torch.uint8, (2, 18)), begin, TensorInfo(torch.float32, (2, 32)))
    assert found["v"] == (TensorInfo(torch.float32, (3,)), begin + 64, TensorInfo(torch.float32, (3,)))


def test_every_beginning_of_a_file_is_refused(tmp_path: Path) -> None:
    file, content = tmp_path / "a.gguf", whole(KEYS, [tensor()], data=36)
    file.write_bytes(content)
    assert read_gguf_header(file).values["general.architecture"] == "llama"
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"a\.gguf is damaged or cut short"):
            read_gguf_header(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (whole([], [], counts=(2**60, 0)), "room for them"),
        (whole([], [], counts=(0, 2**60)), "room for them"),
        (whole([struct.pack("<Q", 2**63)], []), "room for them"),
        (whole([text("k") + struct.pack("<IIQ", 9, 8, 2**60)], []), "room for them"),
        (whole([text("k") + struct.pack("<IIQ", 9, 0, 2**60)], []), "room for them"),
        (whole([text("k") + struct.pack("<IIQ", 9, 9, 1)], []), "array of the type 9"),
        (whole([text("k") + struct.pack("<I", 99)], []), "type 99, which is unknown"),
        (whole([KEYS[1], KEYS[1]], []), "twice"),
        (whole([text("a\nb") + struct.pack("<If", 6, 0.5)], []), "holds the name"),
        (whole([text("general.alignment") + struct.pack("<II", 4, 0)], [tensor()]), "alignment is 0"),
        (whole([text("general.alignment") + struct.pack("<IQ", 10, 2**40)], [tensor()]), "alignment is"),
        (whole([text("general.alignment") + struct.pack("<I", 8) + text("x")], [tensor()]), "alignment is 'x'"),
        (whole([], [tensor(shape=(32, 2**40))]), "bytes long, which the file is not"),
        (whole([], [tensor(shape=(2**40, 2**40))]), "has the shape"),
        (whole([], [tensor(shape=(0, 2))]), "has the shape"),
        (whole([], [tensor(shape=(32, 1, 1, 1, 1))]), "5 dimensions"),
        (whole([], [tensor(shape=(33, 2))]), "33 columns, which blocks of 32 do not divide"),
        (whole([], [tensor(kind=77)]), "ggml's type 77"),
        (whole([], [tensor(offset=2**63)]), "which the file is not"),
        (whole([], [tensor(offset=1)]), "which the file is not"),
        (whole([], [tensor(), tensor()]), "the tensor 'w' twice"),
        (whole([], [tensor(), tensor("v", offset=32)], data=128), "w and v overlap"),
        (b"GGML" + whole([], [])[4:], "does not begin with GGUF"),
        (whole([], [])[:4] + struct.pack("<I", 1) + whole([], [])[8:], "version is 1"),
        (whole([text("k") + struct.pack("<I", 8) + struct.pack("<Q", 1) + b"\xff"], []), "decode"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_gguf_header(file)


def test_a_file_with_codes_that_its_width_does_not_have_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    """A file of 3 bits in Q4_0, in which a code of 4 bits and then an infinite scale appear."""
    out = tmp_path / "out"
    quantize(make_model("llama"), out, QuantConfig.from_dict({**RTN, "bits": 3, "format": "gguf"}))
    (out / "quantization_record.json").unlink()
    file = out / "model.gguf"
    content, begin = file.read_bytes(), read_gguf_header(file).tensors["blk.1.ffn_up.weight"].begin
    for place, byte, message in ((2, 0xFF, "which 3 bits do not hold"), (1, 0x7C, "a scale that is NaN or infinity")):
        file.write_bytes(content[: begin + place] + bytes([byte]) + content[begin + place + 1 :])
        with pytest.raises(InputError, match=rf"layers\.1\.mlp\.up_proj\.weight_ggml .* {message}"):
            load(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "put a space in front",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "normalize text by Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}}, "text by NFKC"),
        ({"normalizer": {"type": "NFC"}}, None),
    ],
)
def test_what_a_file_cannot_say_of_a_tokenizer_is_refused(
    changes: dict[str, Any], message: str | None, make_model: MakeModel
) -> None:
    source = make_model("llama")
    file = source / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    found = gguf_tokenizer.explain_unknown(source)
    assert (found is None) if message is None else message in str(found)


def test_a_scale_of_yarn_that_no_key_has_is_refused(make_model: MakeModel) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    for more, refused in (({}, False), ({"mscale": 0.7}, True), ({"truncate": False}, True)):
        config = AutoConfig.from_pretrained(make_model("llama", rope_parameters={**yarn, **more}))
        assert ("yarn" in (gguf_architectures.explain_unknown(config) or "")) is refused
