"""Quantize a tiny random model of every architecture in transformers, and compare its outputs.

    python scripts/sweep_architectures.py
    python scripts/sweep_architectures.py mamba qwen3_moe
    python scripts/sweep_architectures.py --group image-text --minutes 20
    python scripts/sweep_architectures.py --format gptq pack-quantized
    python scripts/sweep_architectures.py --group encoder --format use
    python scripts/sweep_architectures.py --dtype bfloat16

Each model is built from a configuration with small sizes, with random numbers in every buffer and bias, and saved. Then
the use of its tensors is checked (see `use_problems`), and it is quantized to 8 bits (in a format that has no 8 bits to
4), verified, loaded and run; then loaded by its own class's `from_pretrained` and saved again. The format `use` stands
for the check of the tensors' use alone. With --dtype, models are stored, calibrated and run in fewer bits, but for what
they keep in float32. The script prints a line for each model and format, and counts the outcomes:

    fine      outputs differ from the original's by less than a tenth (at 4 bits by less than a half), from_pretrained
              gives the same outputs, and what it saves holds the same tensors
    differs   outputs differ by more from the original's (possibly because a random router was close to a tie)
    other     the format cannot hold such layers, which is said before any work
    refused   with another error message of ours, which is printed
    failed    with any other exception, or a tensor that is not quantized has changed, or from_pretrained differs, or
              the use of a tensor is not as it is said to be
    unbuilt   transformers cannot build it with these sizes, run it or load it again, or it is too large; not counted

Models that read images are given some if they say how many tokens these take; the line then says `images`.
"""

import argparse
import inspect
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gptq import InputError, QuantConfig, formats, load, quantize
from gptq.checkpoint.assembled import open_source
from gptq.config import FORMATS, GROUP_SIZES, Format
from gptq.evaluation.original_logits import run_by_block
from gptq.formats.original import open_original
from gptq.models.build import open_model
from gptq.models.forward import forward_without_cache, to_device
from gptq.output import verify
from gptq.planning.plan import Plan, plan_checkpoint

GROUPS = {  # name: the tables of transformers that list its architectures, and the Auto class that builds them
    "causal": (["CAUSAL_LM"], "AutoModelForCausalLM"),
    "image-text": (["IMAGE_TEXT_TO_TEXT"], "AutoModelForImageTextToText"),
    "speech": (["SPEECH_SEQ_2_SEQ"], "AutoModelForSpeechSeq2Seq"),
    "ctc": (["CTC"], "AutoModelForCTC"),
    "seq2seq": (["SEQ_TO_SEQ_CAUSAL_LM"], "AutoModelForSeq2SeqLM"),
    "encoder": (["MASKED_LM"], "AutoModelForMaskedLM"),
    "embedding": (["TEXT_ENCODING", "IMAGE_CLASSIFICATION"], "AutoModel"),
}
LARGEST = 30_000_000  # parameters of the largest model that is tried
TOKENS = 200  # token ids in inputs are below this
WINDOWS = 8
GROUPS_OF = {"mlx": 32}  # sizes of groups, of formats that have no groups of 16
FOUR_BITS = ("pack-quantized-a8", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "gguf-k", "gguf-iq4")
USE = "use"  # in the place of a format: what is checked before anything is quantized
LONGEST_SEARCH = 30  # seconds of this process to find inputs that a model runs on
FRAMES = (24, 48, 64, 96, 128, 200, 3000)  # lengths of spectrograms, of which one may be what a model takes
MELS = (16, 80, 128, 160)  # their heights
# Small sizes, and the configuration fields that get them.
WIDTHS = {64: "hidden_size n_embd d_model embedding_size word_embed_proj_dim lru_width embed_dim out_hidden_size"}
INNER = {128: "intermediate_size n_inner d_ff ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size"}
BLOCKS = {2: "num_hidden_layers n_layer num_layers decoder_layers encoder_layers depth num_decoder_layers"}
HEADS = {
    4: "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads mamba_n_heads "
    "mamba_num_heads linear_num_value_heads",
    2: "num_key_value_heads linear_num_key_heads",
    16: "head_dim v_head_dim linear_key_head_dim linear_value_head_dim kv_lora_rank state_size mamba_d_state "
    "hidden_size_per_layer_input",
    32: "mamba_d_head mamba_head_dim q_lora_rank",
    8: "qk_rope_head_dim qk_nope_head_dim",
}
EXPERTS = {
    4: "num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_experts_per_tok moe_k expert_layer_period attn_layer_period full_attention_interval",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    1: "n_shared_experts n_group topk_group first_k_dense_replace attn_layer_offset expert_layer_offset n_groups",
}
TEXT = {
    256: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions",
    32: "sliding_window",
    16: "attention_window",
    250: "image_token_id image_token_index",
    251: "video_token_id",
    252: "audio_token_id audio_token_index",
    4: "mm_tokens_per_image",
    0: "pad_token_id",
    1: "bos_token_id",
    2: "eos_token_id",
}
SMALL = {
    name: value
    for table in (WIDTHS, INNER, BLOCKS, HEADS, EXPERTS, TEXT)
    for value, names in table.items()
    for name in names.split()
}


def small_config(kind: str, axes: bool = False) -> PreTrainedConfig:
    """The architecture's configuration with small sizes, also in its nested configurations.

    With `axes`, rotary positions have sections for time, height and width though the configuration does not say so.
    """
    plain = CONFIG_MAPPING[kind]()
    options = small_options(plain, axes)
    for name in getattr(plain, "sub_configs", None) or ():
        inner = getattr(plain, name, None)
        if isinstance(inner, PreTrainedConfig):
            options[name] = small_options(inner, axes)
    return AutoConfig.for_model(kind, **options)


def small_options(config: PreTrainedConfig, axes: bool = False) -> dict[str, Any]:
    """The small sizes for those fields that the configuration has."""
    given = config.to_dict()
    known = {*given, *getattr(type(config), "attribute_map", {})}
    options: dict[str, Any] = {name: value for name, value in SMALL.items() if name in known}
    if isinstance(kinds := given.get("layer_types"), list):
        options["layer_types"] = ([*dict.fromkeys(kinds)] * 2)[:2]
    if "qk_rope_head_dim" in options:  # multi-head latent attention: every head has its own keys
        options |= {"num_key_value_heads": SMALL["num_attention_heads"], "head_dim": options["qk_rope_head_dim"]}
    rope = given.get("rope_parameters")
    if isinstance(rope, dict) and (axes or isinstance(rope.get("mrope_section"), list)):
        half = int(16 * rope.get("partial_rotary_factor", 1)) // 2  # of the head's 16 features
        options["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (3 * half // 8), *[3 * half // 8] * 2]}
    return options


def small_model(kind: str, auto: str, axes: bool = False) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Build a random model, and inputs that it runs on; raises ValueError if it is too large or finds none."""
    config, build = small_config(kind, axes), getattr(transformers, auto).from_config
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:,.0f} M parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = build(config).eval()
    for parameter in model.parameters():  # transformers leaves some uninitialized
        values = parameter.detach()
        if not bool(torch.isfinite(values).all()) or float(values.abs().max()) > 1e3 or not bool(values.any()):
            values.normal_(0, 0.02)
    for module in model.modules():  # zeros would hide that one is not read
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and key not in module._non_persistent_buffers_set:
                buffer.uniform_(0.5, 1.5)  # variances are positive
    return model, find_inputs(model)


# --- inputs -----------------------------------------------------------------------------------------------------------


def find_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the first inputs on which the model gives finite outputs; raises the last error if there are none."""
    last: Exception = ValueError("it takes none of the inputs that are tried")
    began = time.process_time()
    for make in (inputs_with_images, text_inputs, image_inputs, sound_inputs):
        for inputs in make(model):
            if time.process_time() - began > LONGEST_SEARCH:
                raise last
            problem = problem_with(model, inputs)
            if problem is None:
                return inputs
            last = problem
    raise last


def problem_with(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Exception | None:
    """Run the model; return what goes wrong, if anything does."""
    unknown = inputs.keys() - inspect.signature(model.forward).parameters.keys()
    if unknown:  # a forward with **kwargs would ignore them
        return ValueError(f"it takes no {unknown.pop()}")
    try:
        finite = bool(torch.isfinite(outputs(model, inputs)).all())
    except Exception as error:  # of any type: these inputs do not fit
        return error
    return None if finite else ValueError("its outputs are not finite")


def random_ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, TOKENS, (1, 24), generator=torch.Generator().manual_seed(seed))


def text_inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    ids = random_ids()
    if model.config.is_encoder_decoder:
        yield {"input_ids": ids, "decoder_input_ids": ids[:, :12]}
    yield {"input_ids": ids}


def config_values(model: PreTrainedModel, *names: str) -> list[int]:
    """The values of the first of these fields that any nested configuration has."""
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    found = (getattr(config, name, None) for name in names for config in configs)
    return [value for value in found if isinstance(value, int)][:1]


def random_images(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Images as pixels, and as patches with their grid."""
    draw = torch.Generator().manual_seed(2)
    for size in [*config_values(model, "image_size"), 32, 64, 224]:
        pixels = torch.randn(1, 3, size, size, generator=draw)
        yield {"pixel_values": pixels}
        yield {"pixel_values": pixels, "image_sizes": torch.tensor([[size, size]])}
        yield {"pixel_values": pixels[None], "image_sizes": torch.tensor([[size, size]])}
        yield {"pixel_values": pixels[None]}
    for patch in config_values(model, "patch_size"):
        for frames in (1, 2):
            patches = torch.randn(16, 3 * frames * patch**2, generator=draw)
            yield {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def inputs_with_images(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Text with as many image tokens as the model makes of an image."""
    place = config_values(model, "image_token_id", "image_token_index")
    if not place or not hasattr(model, "get_image_features"):
        return
    for images in random_images(model):
        count = count_places(model, images)
        if not count:
            continue
        ids = torch.cat([random_ids()[:, :8], torch.full((1, count), place[0]), random_ids()[:, 8:]], dim=1)
        yield {"input_ids": ids, **images}
        yield {"input_ids": ids, **images, "mm_token_type_ids": (ids == place[0]).long()}
        yield {"input_ids": ids, **images, "token_type_ids": (ids == place[0]).long()}


def count_places(model: Any, images: dict[str, torch.Tensor]) -> int:
    """Return how many tokens of a text the model makes of images; 0 if the images do not fit."""
    try:
        with torch.no_grad():
            found = model.get_image_features(**images)
        found = getattr(found, "pooler_output", found)
        return sum(piece.shape[:-1].numel() for piece in (found if isinstance(found, list | tuple) else [found]))
    except Exception:  # of any type, depending on the model's code
        return 0


def image_inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """An image alone, or with a text or a decoder's text that has no places for it."""
    ids = random_ids()
    for images in random_images(model):
        for texts in (
            {}, {"input_ids": ids}, {"decoder_input_ids": ids}, {"input_ids": ids, "decoder_input_ids": ids[:, :12]},
            {"input_ids": ids, "qformer_input_ids": ids},
        ):  # fmt: skip
            yield {**images, **texts}


def sound_inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """A recording as samples or as a spectrogram, with a decoder's text where there is one."""
    draw = torch.Generator().manual_seed(3)
    ids = random_ids()[:, :12]
    texts = [{"decoder_input_ids": ids}, {}] if model.config.is_encoder_decoder else [{}, {"input_ids": ids}]
    waves = [{"input_values": torch.randn(1, 4000, generator=draw)}]
    heights = [*config_values(model, "num_mel_bins", "input_feat_per_channel", "feature_size"), *MELS]
    spectra = [torch.randn(1, mels, frames, generator=draw) for mels, frames in product(heights, FRAMES)]
    features = [{"input_features": x} for spectrum in spectra for x in (spectrum, spectrum.transpose(1, 2))]
    for sound, text in product([*waves, *features], texts):
        yield {**sound, **text}


def other_window(inputs: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The same inputs with other random numbers; places of images stay."""
    draw, changed = torch.Generator().manual_seed(seed), {}
    for name, x in inputs.items():
        changed[name] = x
        if x.is_floating_point():
            changed[name] = torch.randn(x.shape, generator=draw)
        elif name.endswith("input_ids"):
            changed[name] = torch.where(x < TOKENS, torch.randint(3, TOKENS, x.shape, generator=draw), x)
    return changed


def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model(**inputs))


def main_output(made: Any) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    found = next((made[name] for name in ("logits", "last_hidden_state") if name in made), None)
    return next(x for x in made.values() if isinstance(x, torch.Tensor)) if found is None else found


# --- one architecture -------------------------------------------------------------------------------------------------


Built = tuple[PreTrainedModel, dict[str, torch.Tensor]]  # a model, and inputs that it runs on


def build_and_save(kind: str, auto: str, folder: Path, dtype: torch.dtype = torch.float32) -> Built | str:
    """Build a model and save it in `folder`; return it as transformers loads it, or why that does not work."""
    try:
        try:
            model, inputs = small_model(kind, auto)
        except RuntimeError:  # of shapes that do not fit
            model, inputs = small_model(kind, auto, axes=True)
        model.to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
        loaded: Any = type(model).from_pretrained(folder, output_loading_info=True)
        if missing := loaded[1]["missing_keys"]:  # as for ShieldGemma 2, which its table builds as another class
            raise ValueError(f"transformers does not find {min(missing)}, which it has saved")
        if dtype != torch.float32:
            model, inputs = loaded[0].eval(), to_device(inputs, torch.device("cpu"), dtype)
            outputs(model, inputs)
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()  # which may lie in the file
            model.save_pretrained(folder)  # now with what it keeps in float32
    except Exception as error:  # of any type: the architecture is not tested
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return model, inputs


def use_problems(built: Built, source: Path) -> tuple[list[str], int]:
    """Compare what the plan says of each tensor's use with what the two readers of a checkpoint do.

    The block-by-block reader has to give what transformers' own `from_pretrained` gives, and to read every tensor that
    the plan does not call unused. Other numbers in all unused tensors must not change what transformers gives.

    Returns the problems, and how many tensors are unused.
    """
    model, inputs = built
    plan = plan_checkpoint(str(source), QuantConfig(bits=8, group_size=16), None, False, sample=inputs)
    problems = [note for note in plan.notes if "is not known" in note]
    theirs = type(model).from_pretrained(source, dtype=torch.float32).eval()
    for tensor in theirs.parameters():
        tensor.data = tensor.data.clone()
    with torch.no_grad():  # without a cache, as ours: FSMT has no causal mask where it makes one
        expected = main_output(forward_without_cache(theirs)(**inputs))
    opened, read = open_model(open_original(source), False), set[str]()
    for name in ("read", "read_unchecked"):
        setattr(opened.source, name, recording(getattr(opened.source, name), read))
    (made,) = run_by_block(opened, [inputs], torch.device("cpu"), torch.float32)
    off = float((main_output(made) - expected).norm() / expected.norm())
    if not off < 1e-5:  # products of other shapes round in another order
        problems.append(f"the model read block by block is off by {off:.2g}")
    problems += [f"{name} is not read" for name in sorted(plan.source.tensors.keys() - plan.unused - read)]
    change_tensors(source, plan, source.with_name("changed"))
    changed = type(model).from_pretrained(source.with_name("changed"), dtype=torch.float32).eval()
    with torch.no_grad():
        again = main_output(forward_without_cache(changed)(**inputs))
    off = float((again - expected).norm() / expected.norm())
    if not off < 1e-5:
        problems.append(f"other numbers in the {len(plan.unused)} unused tensors change the outputs by {off:.2g}")
    return problems, len(plan.unused)


def use_outcome(built: Built, source: Path) -> tuple[str, str]:
    """Check the use of an architecture's tensors; return the outcome and a description."""
    try:
        problems, unused = use_problems(built, source)
    except InputError as error:
        return "refused", str(error)
    except Exception as error:  # of any type: a bug of ours
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ("failed", problems[0]) if problems else ("fine", f"{unused} tensors unused")


def recording(read: Any, names: set[str]) -> Any:
    """A method that reads a tensor, which adds the tensor's name to `names`."""

    def read_and_record(name: str, *args: Any, **kwargs: Any) -> Any:
        names.add(name)
        return read(name, *args, **kwargs)

    return read_and_record


def change_tensors(source: Path, plan: Plan, out: Path) -> None:
    """Save a checkpoint with other numbers in the tensors that the plan calls unused."""
    shutil.copytree(source, out)
    unused = {stored for name in plan.unused for stored in plan.source.stored_names(name)}
    for file in out.glob("*.safetensors"):
        tensors, draw = load_file(file), torch.Generator().manual_seed(4)
        for name in sorted(unused & tensors.keys()):
            if (old := tensors[name]).is_floating_point():
                tensors[name] = torch.rand(old.shape, generator=draw).to(old.dtype) + 0.5
        save_file(tensors, file, metadata={"format": "pt"})


def outcome(built: Built, source: Path, out: Path, chosen: Format, dtype: str = "float32") -> tuple[str, str]:
    """Try one architecture in one format; return its outcome and a description."""
    model, inputs = built
    windows, bits = [other_window(inputs, seed) for seed in range(WINDOWS)], 4 if chosen in FOUR_BITS else 8
    config = QuantConfig(bits=bits, group_size=(GROUPS_OF | GROUP_SIZES).get(chosen, 16), format=chosen)
    try:
        result = quantize(source, out, config, calibration=windows, dtype=dtype)
        found = outputs(load(out, dtype=dtype), inputs)
        packed = {f"{layer.name}.weight" for layer in verify.inspect(out).layers}  # some formats call the codes so
        problems = [*verify.verify(out).problems, *changed_tensors(source, out, packed)]
        if not formats.FORMATS[chosen].is_assembled:  # those are for other engines
            problems += from_pretrained_problems(type(model), out, inputs, found, getattr(torch, dtype))
        if problems:
            return "failed", problems[0]
    except InputError as error:
        return "other" if f"be written as {chosen!r}" in str(error) else "refused", str(error)
    except Exception as error:  # of any type: a bug of ours
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    expected = outputs(model, inputs)
    off = float((found - expected).norm() / expected.norm())
    fused = ", fused experts stay" if any("fused tensors" in note for note in result.notes) else ""
    given = ", images" if any(name.startswith("pixel") for name in inputs) else ""
    left = ", parts stay" if any("has no inputs for" in note for note in result.notes) else ""
    within = "fine" if off < (0.1 if bits == 8 else 0.5) else "differs"
    return within, f"{len(result.layers)} layers, off by {off:.1%}{given}{left}{fused}"


def from_pretrained_problems(
    kind: Any, out: Path, inputs: dict[str, torch.Tensor], expected: torch.Tensor, dtype: torch.dtype
) -> Iterator[str]:
    """Load with transformers and save again; yield a sentence for each difference.

    Args:
        expected: the outputs of the model that `gptq.load` returns.
    """
    model = kind.from_pretrained(out, dtype=dtype).eval()
    for tensor in model.parameters():  # which lie where the file has them; torch's convolutions round by the address
        tensor.data = tensor.data.clone()
    found = outputs(model, inputs)
    if not torch.equal(found, expected):
        yield f"from_pretrained's outputs are not gptq.load's: off by {float((found - expected).norm()):.2g}"
    model.save_pretrained(out.parent / "again")
    stored, saved = (tensors_of(folder) for folder in (out, out.parent / "again"))
    for name in sorted(stored.keys() ^ saved.keys()):
        yield f"save_pretrained {'adds' if name in saved else 'leaves out'} {name}"
    for name in changed_tensors(out, out.parent / "again"):
        yield f"saved again: {name}"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source(folder)
    return {name: source.read_unchecked(name) for name in source.tensors}


def changed_tensors(before: Path, after: Path, besides: Collection[str] = ()) -> Iterator[str]:
    """Yield a sentence for each tensor that both folders have, but for some, and that is not the same."""
    old, new = tensors_of(before), tensors_of(after)
    for name in sorted((old.keys() & new.keys()).difference(besides)):
        if old[name].dtype != new[name].dtype or not torch.equal(old[name], new[name]):
            yield f"{name} is in both files, and has changed"


def kinds_of(group: str) -> list[str]:
    tables = [getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES") for table in GROUPS[group][0]]
    return list(dict.fromkeys(kind for table in tables for kind in table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all of the group if none is given")
    parser.add_argument("--group", choices=[*GROUPS], default="causal", help="default: %(default)s")
    parser.add_argument("--format", nargs="+", choices=[USE, *FORMATS], default=["gptq"], help="default: gptq")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are tiny
    counts: Counter[tuple[str, str | None]] = Counter()
    kinds, began = args.kinds or kinds_of(args.group), time.monotonic()
    for tried, kind in enumerate(kinds):
        if time.monotonic() - began > 60 * args.minutes:
            print(f"stopped after {tried} of {len(kinds)}")
            break
        for became, chosen in try_formats(kind, GROUPS[args.group][1], args.format, args.dtype):
            counts[became, chosen] += 1
    unbuilt = counts.pop(("unbuilt", None), 0)
    for chosen in args.format:
        own = Counter({became: count for (became, of), count in counts.items() if of == chosen})
        print(f"{chosen}: {', '.join(f'{n} {became}' for became, n in own.most_common())} ({own.total()} built)")
    print(f"{unbuilt} unbuilt")


def try_formats(kind: str, auto: str, chosen: list[Any], dtype: str) -> Iterator[tuple[str, str | None]]:
    """Try an architecture in each format, and print and yield the outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        built = build_and_save(kind, auto, Path(folder) / "model", getattr(torch, dtype))
        if isinstance(built, str):
            print(f"{kind:26} unbuilt {'':16} {built}", flush=True)
            yield "unbuilt", None
            return
        used, unused = "fine", "use not checked"
        if dtype == "float32":
            used, unused = use_outcome(built, Path(folder) / "model")
        if used != "fine" or USE in chosen:
            print(f"{kind:26} {used:7} {USE:16} {unused}", flush=True)
        for one in chosen:
            if one == USE or used == "failed":
                yield used, one
                continue
            with tempfile.TemporaryDirectory(dir=folder) as own:
                became, words = outcome(built, Path(folder) / "model", Path(own) / "out", one, dtype)
            print(f"{kind:26} {became:7} {one:16} {words}, {unused}", flush=True)
            yield became, one


if __name__ == "__main__":
    main()
