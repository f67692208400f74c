"""What is written beside the tensors: configuration, tokenizer, and the record that `verify` compares with."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptq import formats
from gptq.checkpoint import MARKER, copy_files, sha256_file
from gptq.config import QuantConfig
from gptq.errors import InputError
from gptq.plan import LayerPlan
from gptq.version import __version__

RECORD = "quantization_record.json"
COPIED_FILES = (".json", ".txt", ".model", ".jinja", ".py", ".md", "LICENSE")


@dataclass(frozen=True)
class LayerResult:
    """What came of one linear layer.

    `error` is the exact relative output error on the calibration tokens, ||(W - Q) X||^2 / ||W X||^2, and `rtn_error`
    the same for round-to-nearest on the same inputs. Where no calibration token was used (method "rtn", or a layer
    that none reached), X is the identity.
    """

    name: str
    bits: int
    group_size: int
    error: float
    rtn_error: float
    damp: float | None
    tokens: int
    seconds: float


def write_files(
    source: Path,
    out: Path,
    config: QuantConfig,
    plans: dict[str, LayerPlan],
    results: list[LayerResult],
    weight_checksums: dict[str, str],
    tensor_checksums: dict[str, str],
    calibration: str | None,
) -> None:
    """Write config.json, quantize_config.json, the source's small files, and the record; no times, so that the same
    run makes the same bytes."""
    written = {"config.json", "quantize_config.json", RECORD}
    copy_files(source, out, lambda n: n.endswith(COPIED_FILES) and n not in written and not n.endswith(".index.json"))
    shuffled = config.method == "gptq" and config.desc_act and not config.static_groups and config.group_size != -1
    quantization = formats.quantization_config(config, shuffled)
    hf_config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _write_json(out / "config.json", {**hf_config, "quantization_config": quantization})
    _write_json(out / "quantize_config.json", quantization)
    layers = []
    for result in results:
        entry = {"stored": plans[result.name].stored, **asdict(result), "weight_sha256": weight_checksums[result.name]}
        del entry["seconds"]
        layers.append(entry)
    record = {
        "quantizer": f"gptq {__version__}",
        "config": config.to_dict(),
        "calibration": calibration,
        "layers": layers,
        "tensors": tensor_checksums,
        "files": {
            p.name: sha256_file(p) for p in sorted(out.iterdir()) if p.suffix != ".safetensors" and p.name != MARKER
        },
    }
    _write_json(out / RECORD, record)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Raises InputError if the folder has no record, or a damaged one."""
    file = folder / RECORD
    if not file.is_file():
        raise InputError(f"{folder} has no {RECORD}, so there is nothing to compare with; another tool wrote it")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = record["files"].items(), record["tensors"].items()
        for entry in record["layers"]:
            _ = entry["stored"] + entry["weight_sha256"], entry["error"] + 0.0, entry["rtn_error"] + 0.0
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged: {error!r}") from error
    return record
