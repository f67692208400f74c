"""Images, sound and chats as calibration: what they reach is quantized, what they do not reach stays as it was."""

import copy
import io
import json
import wave
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gptq import InputError, QuantConfig, load, quantize
from gptq.calibration import windows
from gptq.calibration.windows import read_calibration
from gptq.models.hf_config import read_processor
from gptq.models.trial_forward import ZeroWeight
from gptq.output import verify
from tests.conftest import LLAMA_LIKE, OTHERS, VOCAB

CONFIG = QuantConfig(bits=4, group_size=32, num_samples=8, seq_len=32, effort="fast", format="gptq")
CONFIG64 = QuantConfig(**{**CONFIG.to_dict(), "seq_len": 64})
IMAGE, START, END = VOCAB - 4, VOCAB - 3, VOCAB - 2  # tokens of the tiny Qwen2-VL
QWEN: dict[str, Any] = {
    "text_config": {
        **LLAMA_LIKE, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    },
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    "image_token_id": IMAGE, "video_token_id": VOCAB - 1, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
TOWER = [f"model.visual.blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def save(network: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a model with weights as large as trained ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else parameter.data.normal_(1, 0.1)
    network.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def qwen(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Qwen2-VL: 8 layers in the tower, 14 in the language model."""
    network = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(**QWEN))
    return save(network, tmp_path / "qwen", tokenizer)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_text_does_not_reach_stays_bit_for_bit(qwen: Path, windows: Tensor, tmp_path: Path) -> None:
    ids = windows.clamp(max=IMAGE - 1)
    result = quantize(qwen, tmp_path / "out", CONFIG, calibration=ids)
    before, after = weights_of(qwen), weights_of(tmp_path / "out")
    assert len(result.layers) == 14
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("visual."))
    assert [n for n in result.notes if "visual" in n] == [
        "model.visual.blocks stays as it is: the calibration has no inputs for it",
        "visual (31 tensors): the forward of the calibration inputs does not compute with it; copied",
    ]
    assert verify.verify(tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("override", "layers", "bits", "note"),
    [
        ("visual:bits=8", 22, 8, "as an override asks"),
        ("visual:skip", 14, None, "model.visual.blocks stays as it is"),
        ("mlp:bits=8", 14, None, "model.visual.blocks stays as it is"),  # names reached layers too: it is about those
    ],
)
def test_an_override_can_ask_for_what_is_not_reached(
    override: str, layers: int, bits: int | None, note: str, qwen: Path, windows: Tensor, tmp_path: Path
) -> None:
    config = QuantConfig.from_dict({**CONFIG.to_dict(), "overrides": [override]})
    result = quantize(qwen, tmp_path / "out", config, calibration=windows.clamp(max=IMAGE - 1))
    tower = [layer for layer in result.layers if "visual" in layer.name]
    assert (len(result.layers), {layer.bits for layer in tower}) == (layers, {bits} - {None})
    about = [n for n in result.notes if "visual" in n and "group" not in n and "does not compute with" not in n]
    assert [note in n for n in about] == [True]
    assert verify.verify(tmp_path / "out").problems == []


def test_an_override_that_names_nothing_is_still_refused(qwen: Path, windows: Tensor, tmp_path: Path) -> None:
    config = QuantConfig.from_dict({**CONFIG.to_dict(), "overrides": ["vision:skip"]})
    with pytest.raises(InputError, match="'vision:skip=true' names no layer"):
        quantize(qwen, tmp_path / "out", config, calibration=windows)


# --- what a processor returns, in Python ------------------------------------------------------------------------------


def qwen_windows(rng: torch.Generator, count: int = 8) -> list[dict[str, Tensor]]:
    """What Qwen2-VL's image processor and tokenizer give for pictures of several sizes, one window each."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    sizes = {"shortest_edge": 64, "longest_edge": 1024}
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=sizes)
    windows = []
    for number in range(count):
        image = torch.randint(0, 256, (3, 16, 16 + 8 * (number % 3)), generator=rng, dtype=torch.uint8)
        found = processor(images=image.numpy(), return_tensors="pt", input_data_format="channels_first")
        places = torch.full((len(found["pixel_values"]) // 4,), IMAGE)
        words = torch.randint(1, 300, (12,), generator=rng)
        ids = torch.cat([words[:4], torch.tensor([START]), places, torch.tensor([END]), words[4:]])
        pad = torch.zeros(number % 2, dtype=torch.long)  # on the left, where generation has it
        types = torch.cat([pad, (ids == IMAGE).long()])
        mask = torch.cat([pad, torch.ones_like(ids)])
        windows.append(
            {
                **found,
                "input_ids": torch.cat([pad, ids])[None],
                "attention_mask": mask[None],
                "mm_token_type_ids": types[None],
            }
        )
    return windows


def test_windows_of_patches_quantize_the_tower_too(qwen: Path, rng: torch.Generator, tmp_path: Path) -> None:
    windows = qwen_windows(rng)
    assert len({len(window["pixel_values"]) for window in windows}) > 1
    result = quantize(qwen, tmp_path / "out", CONFIG, calibration=windows)
    tokens = {layer.name: layer.tokens for layer in result.layers}
    patches = sum(len(window["pixel_values"]) for window in windows)
    unmasked = sum(int(window["attention_mask"].sum()) for window in windows)
    assert {tokens.pop(name) for name in TOWER} == {patches}
    assert (len(tokens), {*tokens.values()}) == (14, {unmasked})
    assert all(layer.error < layer.rtn_error for layer in result.layers)
    assert verify.verify(tmp_path / "out").problems == []
    original = transformers.Qwen2VLForConditionalGeneration.from_pretrained(qwen).eval()
    with torch.no_grad():
        expected, found = original(**windows[0]).logits, load(tmp_path / "out", dtype="float32")(**windows[0]).logits
    assert (found - expected).norm() < 0.25 * expected.norm()


@pytest.mark.slow
def test_padding_does_not_change_a_byte(qwen: Path, rng: torch.Generator, tmp_path: Path) -> None:
    """A window's pictures stay; of its tokens the masked ones are as if they were not there."""
    plain = [dict(window) for window in qwen_windows(rng, 2)]
    for window in plain:
        kept = window["attention_mask"][0] > 0
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            window[name] = window[name][:, kept]
    files = []
    for side, order in (("none", None), ("left", (0, 1)), ("right", (1, 0))):
        padded = []
        for window in plain:
            longer = dict(window)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                pieces = [torch.zeros(1, 5, dtype=torch.long), window[name]]
                longer[name] = window[name] if order is None else torch.cat([pieces[i] for i in order], 1)
            padded.append(longer)
        quantize(qwen, tmp_path / side, CONFIG, calibration=padded)
        files.append((tmp_path / side / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


# --- data sets through the model's own processor ----------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture
def llava(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny LLaVA with its processor: pictures of 16 x 16 are 4 patches and a class token in the tower."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<image>"]})
    own.image_token = "<image>"
    text: dict[str, Any] = {**LLAMA_LIKE, "vocab_size": VOCAB + 8, "pad_token_id": 0}
    place: Any = own.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        image_token_index=place,
        image_seq_length=4,
    )
    folder = save(transformers.LlavaForConditionalGeneration(config), tmp_path / "llava", own)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(
        image_processor=pictures, tokenizer=own, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(5)
    return [Image.fromarray(draw.integers(0, 256, (20, 24 + i, 3), dtype=np.uint8)) for i in range(count)]


def image_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A folder as `datasets` reads it: pictures, and metadata.jsonl with what is said of each."""
    folder.mkdir()
    for number, (picture, row) in enumerate(zip(pictures(len(rows)), rows, strict=True)):
        picture.save(folder / f"{number}.png")
        row["file_name"] = f"{number}.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


SAYINGS = [f"the picture number {number} shows noise and nothing else" for number in range(8)]
TALKS = [[{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": saying}] for saying in SAYINGS]


@pytest.mark.slow
def test_a_folder_of_pictures_goes_through_the_models_processor(llava: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pictures", [{"messages": talk} for talk in TALKS])
    out, given = tmp_path / "out", tmp_path / "given"
    processor = transformers.AutoProcessor.from_pretrained(llava)
    expected = [
        dict(processor(text=f"user:<image>what is this?\nassistant:{saying}\n", images=picture, return_tensors="pt"))
        for picture, saying in zip(pictures(8), SAYINGS, strict=True)
    ]
    result = quantize(llava, out, CONFIG64, calibration=str(folder))
    tokens = {layer.name: layer.tokens for layer in result.layers}
    assert {n for name, n in tokens.items() if "vision_tower" in name} == {8 * 5}
    assert {n for name, n in tokens.items() if "language_model" in name} == {
        sum(found["input_ids"].shape[1] for found in expected)
    }
    assert len(result.layers) == 14 + 3 * 6
    assert not [note for note in result.notes if "stay" in note]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    quantize(llava, given, CONFIG64, calibration=[expected[i] for i in order])
    assert (out / "model.safetensors").read_bytes() == (given / "model.safetensors").read_bytes()
    original = transformers.LlavaForConditionalGeneration.from_pretrained(llava).eval()
    with torch.no_grad():
        found, whole = (model(**expected[0]).logits for model in (load(out, dtype="float32"), original))
    assert (found - whole).norm() < 0.25 * whole.norm()


def test_the_model_may_not_change_from_the_reading_of_its_processor_on(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = image_folder(tmp_path / "pictures", [{"messages": talk} for talk in TALKS]), llava / "config.json"

    def read(*arguments: Any) -> Any:
        file.write_text(file.read_text() + " ")
        return read_processor(*arguments)

    monkeypatch.setattr(windows, "read_processor", read)
    with pytest.raises(InputError, match=rf"{file} was changed"):
        quantize(llava, tmp_path / "out", CONFIG64, calibration=str(folder))
    assert not (tmp_path / "out").exists()


def test_every_kind_of_rows_with_pictures_is_the_same(llava: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "what is this?"}, {"type": "image"}]}
    ]
    asked = [{"role": "user", "content": "what is this?<image>"}]
    inline = [
        {"role": "user", "content": [told[0]["content"][0], {"type": "image", "image": picture}]}
        for picture in pictures(3)
    ]
    data = datasets.Dataset.from_list([{"images": [picture], "messages": asked} for picture in pictures(3)])
    data.to_parquet(tmp_path / "a.parquet")
    for number, picture in enumerate(pictures(3)):
        picture.save(tmp_path / f"{number}.png")
    lines = [{"image": f"{number}.png", "messages": told} for number in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    raw = io.BytesIO()
    pictures(1)[0].save(raw, "png")
    kinds: list[Any] = [
        [{"image": picture, "messages": told} for picture in pictures(3)],
        [{"images": [np.asarray(picture)], "messages": asked} for picture in pictures(3)],
        [{"image": {"bytes": raw.getvalue(), "path": None}, "messages": told}, *lines[1:]],
        [{"messages": [message]} for message in inline],
        data, tmp_path / "a.jsonl", str(tmp_path / "a.parquet"),
    ]  # fmt: skip
    for row in kinds[2][1:]:
        row["image"] = str(tmp_path / row["image"])
    found = [read_calibration(kind, CONFIG64, llava).inputs for kind in kinds]
    assert found[0] is not None
    assert len(found[0]) == 3
    for other in found[1:]:
        assert other is not None
        for window, same in zip(found[0], other, strict=True):
            assert window.keys() == same.keys()
            assert all(torch.equal(window[name], same[name]) for name in window)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": b"none", "text": "a"}, "given rows, row 0: the image cannot be read: cannot identify image file"),
        ({"image": "absent.png", "text": "a"}, "row 0: the image cannot be read: .*absent.png"),
        ({"image": "https://a/b.png", "text": "a"}, "row 0: the image cannot be read: .*download it first"),
        ({"image": pictures(1)[0], "messages": TALKS[0][1:]}, "row 0: the chat has no message of a user"),
        ({"images": pictures(2), "messages": [{"role": "user", "content": "<image>"}]},
         "row 0: the chat has places for 1 of image, and the row has 2"),
        ({"image": None, "text": "a"}, "no row for calibration: 1 have neither image nor sound"),
        ({"image": pictures(1)[0], "text": "word " * 99}, "no row for calibration: .* 1 have more than 64 tokens"),
        ({"audio": b"none"}, "row 0: the sound cannot be read"),
    ],
)  # fmt: skip
def test_pictures_that_do_not_fit_are_a_sentence(row: dict[str, Any], message: str, llava: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_calibration([row], CONFIG64, llava)


def test_pictures_need_a_processor(qwen: Path) -> None:
    with pytest.raises(InputError, match=r"qwen has (no usable processor|a tokenizer and no processor)"):
        read_calibration([{"image": pictures(1)[0], "text": "a"}], CONFIG, qwen)


@pytest.fixture
def whisper(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    sizes = OTHERS["whisper"][1]
    config = transformers.WhisperConfig(**{**sizes, "max_source_positions": 50, "pad_token_id": 0, "eos_token_id": 0})
    folder = save(transformers.WhisperForConditionalGeneration(config), tmp_path / "whisper", tokenizer)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1, n_fft=400)
    extractor.save_pretrained(folder)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def record(file: Path, rate: int, number: int) -> None:
    wave_form = np.random.default_rng(number).normal(0, 8000, (rate // 2, 2)).clip(-32768, 32767).astype("<i2")
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(2)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        opened.writeframes(wave_form.tobytes())


def test_a_folder_of_recordings_goes_through_the_models_processor(whisper: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number in range(8):
        record(folder / f"{number}.wav", 16000, number)
    rows = [{"file_name": f"{number}.wav", "text": saying} for number, saying in enumerate(SAYINGS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = QuantConfig(**{**CONFIG.to_dict(), "seq_len": 30})
    opened = read_calibration(str(folder), config, whisper)
    assert opened.inputs is not None
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper)
    for window, row in zip(opened.inputs, order, strict=True):
        with wave.open(str(folder / f"{row}.wav")) as recording:
            heard = np.frombuffer(recording.readframes(10**6), "<i2").reshape(-1, 2).astype(np.float64) / 2**15
        extractor = transformers.WhisperFeatureExtractor.from_pretrained(whisper)
        features = extractor(heard.mean(1).astype(np.float32), sampling_rate=16000, return_tensors="pt")
        torch.testing.assert_close(window["input_features"], features["input_features"], atol=1e-5, rtol=1e-5)
        assert window["decoder_input_ids"].tolist() == [[1, *tokenizer(SAYINGS[row])["input_ids"][:29]]]
    result = quantize(whisper, tmp_path / "out", config, calibration=str(folder))
    assert len(result.layers) == 2 * 6 + 2 * 10
    record(folder / "0.wav", 8000, 0)
    with pytest.raises(
        InputError, match=r"recordings, row \d: the sound has 8000 samples a second, the model reads 16000"
    ):
        read_calibration(str(folder), config, whisper)


def test_weights_of_zero_take_no_memory_and_have_the_shapes_of_others() -> None:
    big = ZeroWeight.like(torch.empty(2**16, 2**16, 2**8, device="meta"))  # 4 TB, if it were in memory
    assert torch.equal(torch.nn.functional.linear(torch.ones(3, 2**8), big[1]), torch.zeros(3, 2**16))
    assert (torch.ones(2, 3, 2**16) @ big[:2]).shape == (2, 3, 2**8)
    for copied in (
        big.float().contiguous(),
        big.to(torch.bfloat16),
        big.transpose(1, 2).clone()[0],
        big.type(torch.int8),
    ):
        assert isinstance(copied, ZeroWeight)
    assert big.to(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    small, inputs = ZeroWeight.like(torch.empty(4, 6)), torch.randn(2, 6)
    for found, expected in (
        (inputs @ small.T, torch.zeros(2, 4)),
        (small + 1, torch.ones(4, 6)),
        (torch.einsum("ti,oi->to", inputs, small), torch.zeros(2, 4)),
        (torch.nn.functional.embedding(torch.tensor([1, 2]), small), torch.zeros(2, 6)),
    ):
        assert torch.equal(found, expected)
