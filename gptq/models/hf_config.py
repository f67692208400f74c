"""Read config.json and the tokenizer; choose device, dtype and window length."""

import re
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from gptq.checkpoint.json_objects import Options, read_options
from gptq.checkpoint.untrusted import read_json
from gptq.config import DTYPES, require_device, require_dtype
from gptq.errors import InputError, first_line

COUNT_KEY = re.compile(r"(^|_)(layers?|blocks?|labels?|experts?|heads?|stages?|depths?|codebooks?)($|_)")
TOKENIZERS = ("*token*", "vocab*", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.py")  # names of files of tokenizers
MAX_COUNT = 2**20  # largest count accepted from config.json, because transformers builds that many modules at once


def _require_dtype(name: str | None) -> str | None:
    if name is not None and not isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype):
        raise ValueError(name)
    return name


DtypeName = Annotated[str | None, AfterValidator(_require_dtype)]


class _ModelConfig(Options):
    """What transformers takes from config.json without a look."""

    architectures: list[str] | None = Field(None, description="it is a list of names of classes")
    dtype: DtypeName = Field(None, description="it is the name of a dtype, such as bfloat16")
    torch_dtype: DtypeName = Field(None, description="it is the name of a dtype, such as bfloat16")


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Read config.json.

    Raises:
        InputError: config.json is missing or broken, or describes a model that transformers does not know.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; is it a model folder?")
    values = read_json(folder / "config.json")
    _check_config(folder / "config.json", values)
    read_options(_ModelConfig, values, str(folder / "config.json"))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # any type, depending on what the file holds
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder / 'config.json'} could not be used: {reason}") from error
    return config


def _check_config(file: Path, values: dict[str, Any]) -> None:
    """Check config.json for values that are dangerous to hand to transformers.

    Raises:
        InputError: a value would make transformers build millions of modules, or load code from the Hub.
    """
    for key, value in values.items():
        if isinstance(value, dict):
            _check_config(file, value)
        elif isinstance(value, int | float) and COUNT_KEY.search(key) and value > MAX_COUNT:
            raise InputError(f"{file} says {key} {value}; no model has so many")
        elif key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise InputError(f"{file} asks for {key} {value!r}, which would be code from the Hub; delete that line")


def choose_device(device: str) -> torch.device:
    """Return the device to compute on; "auto" is a GPU if there is one.

    Raises:
        InputError: there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    try:
        return torch.empty(0, dtype=torch.float32, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def all_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return a model's configuration and those of the models inside it."""
    inner = [getattr(config, key, None) for key in config.sub_configs or ()]
    return [config, *(part for one in inner if isinstance(one, PreTrainedConfig) for part in all_configs(one))]


def choose_dtype(dtype: str, hf_config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of forward passes; `quantize` documents the choices.

    Raises:
        InputError: `dtype` is none of these choices.
    """
    require_dtype(dtype)
    known: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES[1:]}
    if dtype in known:
        return known[dtype]
    stored = getattr(hf_config, "dtype", None) or torch.float32
    native = device.type != "cpu" or (stored == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    return stored if native and stored in known.values() else torch.float32


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model folder.

    Raises:
        InputError: the tokenizer is missing or broken.
    """
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        raise InputError(f"{folder} holds no tokenizer (tokenizer.json, say); copy its files from the original model")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # any type, depending on what the files hold
        reason = first_line(error) if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise InputError(f"{folder} has no usable tokenizer: {reason}") from error
    return tokenizer


def fit_seq_len(seq_len: int, hf_config: PreTrainedConfig, model: nn.Module | None = None) -> tuple[int, list[str]]:
    """Return seq_len or the model's limit, whichever is smaller; and a note if the limit applied.

    A position embedding with a padding row (RoBERTa's) has fewer usable positions than config.json says; pass `model`
    to count them.

    Raises:
        InputError: the limit is less than 2 tokens.
    """
    limit = getattr(hf_config, "max_position_embeddings", None)
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings")] if model is not None else []
    padding = max(
        (m.padding_idx for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None), default=-1
    )
    if not isinstance(limit, int) or limit < 1 or limit - padding - 1 >= seq_len:  # XLNet's -1 is no limit
        return seq_len, []
    limit -= padding + 1
    if limit < 2:
        raise InputError(f"config.json leaves room for windows of {limit} tokens; a window has at least 2")
    return limit, [f"windows are {limit} tokens, the model's limit, instead of {seq_len}"]


def read_processor(folder: Path, trust_remote_code: bool) -> Any:
    """Read the processor of a model folder: what makes the model's inputs of images and sound.

    Raises:
        InputError: the processor is missing or broken, or needs a package that is not installed.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # any type, depending on what the files hold
        raise InputError(f"{folder} has no usable processor: {first_line(error)}") from error
    if isinstance(processor, PreTrainedTokenizerBase):
        raise InputError(
            f"{folder} has a tokenizer and no processor for images or sound; preprocessor_config.json of the original "
            "is missing"
        )
    return processor
