"""The demonstration: quantize a small trained Llama to 4 and 3 bits, and measure it on text it was not trained on.

The text is the standard library's `pydoc_data.topics`. Its topics are sorted by name; every second one is used for
calibration, the rest for measuring. The model, in `demo_model/`, was trained by `scripts/train_demo_model.py`.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from gptq import calibration
from gptq.config import Method, QuantConfig
from gptq.evaluation.evaluate import measure_perplexity
from gptq.inference.load import load
from gptq.models.hf_config import read_tokenizer
from gptq.pipeline.quantize import quantize
from gptq.pipeline.run import Observer

MODEL = Path(__file__).parent / "demo_model"
SEQ_LEN, GROUP_SIZE = 512, 128
CALIBRATION_WINDOWS, MEASURED_WINDOWS = 32, 64  # twice the calibration gains 0.1 % and takes a third more time
PROMPT = "Abstract\n========\n\nThis PEP proposes"


@dataclass(frozen=True)
class Row:
    """One line of the table; `above_original` is the relative increase of perplexity."""

    bits: int
    method: str
    bytes: int
    bits_per_weight: float
    perplexity: float
    above_original: float


@dataclass(frozen=True)
class Demo:
    """The measured table, and the text that the 4-bit GPTQ model generates after the prompt."""

    rows: list[Row]
    prompt: str
    generated: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_texts() -> tuple[str, str]:
    """Return the calibration text and the text to measure."""
    ordered = [topics[name] for name in sorted(topics)]
    return "\n\n".join(ordered[0::2]), "\n\n".join(ordered[1::2])


def run(observer: Observer) -> Demo:
    """Quantize and measure the demo model; takes about a minute on two cores."""
    tokenizer = read_tokenizer(MODEL, trust_remote_code=False)
    calibration_text, measured_text = read_texts()
    calibration_windows = calibration.draw_windows([calibration_text], tokenizer, CALIBRATION_WINDOWS, SEQ_LEN, seed=0)
    measured = calibration.evaluation_windows([measured_text], tokenizer, SEQ_LEN, MEASURED_WINDOWS)
    observer.stage("measuring the original")
    original = measure_perplexity(load(MODEL), measured).perplexity
    size = (MODEL / "model.safetensors").stat().st_size
    rows = [Row(16, "original", size, 16.0, original, 0.0)]
    generated = ""
    methods: list[Method] = ["rtn", "gptq"]
    with tempfile.TemporaryDirectory(prefix="gptq-demo-") as folder:
        for bits in (4, 3):
            for method in methods:
                observer.stage(f"{bits} bits, {method}")
                out = Path(folder) / f"{method}{bits}"
                config = QuantConfig(bits=bits, group_size=GROUP_SIZE, method=method)
                made = quantize(MODEL, out, config, calibration=calibration_windows)
                network = load(out)
                found = measure_perplexity(network, measured).perplexity
                rows.append(Row(bits, method, made.bytes_after, made.bits_per_weight, found, found / original - 1))
                if (bits, method) == (4, "gptq"):
                    prompt = tokenizer(PROMPT, return_tensors="pt").to(network.device)
                    tokens = network.generate(**prompt, max_new_tokens=48, do_sample=False, repetition_penalty=1.3)  # type: ignore[operator]
                    generated = str(
                        tokenizer.decode(tokens[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
                    )
    return Demo(rows, PROMPT, generated)
