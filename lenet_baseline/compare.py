"""Compare float, int8 and weight-only quantization of the same models on the same test images; write results.json."""

import json
import math
from contextlib import suppress
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import t as student_t
from torch import Tensor
from tqdm import tqdm

from gptq.errors import InputError
from lenet_baseline.activations import Activations, record_activations
from lenet_baseline.data import Data
from lenet_baseline.integer import IntegerLeNet, quantize_lenet, run_integers, simulate
from lenet_baseline.maxabs import RULES, full_range, three_sigma_range
from lenet_baseline.model import LAYERS, Bias, LeNet, write_atomically
from lenet_baseline.train import accuracy, logits, train_or_reuse
from lenet_baseline.weight_only import BITS, METHODS, quantize_model

VERSION = 1  # version of the format of results.json
RESULTS = "results.json"
CALIBRATION_IMAGES = 1024  # training images that set the ranges of activations and GPTQ's Hessians
CONFIDENCE_LEVEL = 0.95
ACCURACY_MARGIN = 0.005  # largest loss of accuracy at which int8 still counts as equal to float: half a point
HISTOGRAM_BINS = 50

Json = dict[str, Any]


def compare(data: Data, out: Path, bias: Bias, epochs: int, num_seeds: int) -> Json:
    """Train or reuse one model per seed, quantize each by all methods, write OUT/results.json and return its content.

    The seed decides a model's training and its calibration images, so an interval over seeds covers both.
    """
    runs, distributions = [], {}
    for seed in range(num_seeds):
        model, _ = train_or_reuse(out, data, bias, seed, epochs)
        images = data.train.draw(CALIBRATION_IMAGES, seed)
        activations = record_activations(model, images)
        if seed == 0:
            distributions = _distributions(model, activations)
        runs.append(_run(model, activations, images, data, seed))
    results = {
        "version": VERSION,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "train_images": len(data.train),
            "test_images": len(data.test),
        },
        "settings": {"bias": bias, "epochs": epochs, "seeds": num_seeds, "calibration_images": len(images)},
        "runs": runs,
        "summary": summarize(runs),
        "distributions": distributions,
    }
    write_atomically(out / RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    return results


def read_results(out: Path) -> Json:
    """Read the results that an earlier `compare` wrote to a folder.

    Raises:
        InputError: the file is missing, does not hold results, or has another version.
    """
    path = out / RESULTS
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; run `compare --out {out}` first")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        results: Json = json.loads(path.read_text(encoding="utf-8"))
        if results["version"] == VERSION:
            return results
    raise InputError(f"{path} holds no results of this version; run `compare --out {out}` again")


# --- one seed ---------------------------------------------------------------------------------------------------------


def _run(model: LeNet, activations: Activations, images: Tensor, data: Data, seed: int) -> Json:
    """Measure one seed's model: float, all int8 variants, and all weight-only variants."""
    run: Json = {"seed": seed, "float": accuracy(logits(model, data.test), data.test), "int8": [], "weight_only": []}
    with tqdm(total=2 * len(RULES) + len(BITS), desc=f"quantizing, seed {seed}", unit="model") as bar:
        for rule in RULES:
            for per_channel in (False, True):
                run["int8"].append(_int8(quantize_lenet(model, activations, rule, per_channel), data, per_channel))
                bar.update()
        for bits in BITS:
            quantized = quantize_model(model, bits, images)
            for method in METHODS:
                found = accuracy(logits(quantized.models[method], data.test), data.test)
                row = {"bits": bits, "method": method, "accuracy": found, "layer_errors": quantized.errors[method]}
                run["weight_only"].append(row)
            bar.update()
    return run


def _int8(net: IntegerLeNet, data: Data, per_channel: bool) -> Json:
    """Measure an int8 model on the test images, by the simulated and by the integer path."""
    simulated = logits(lambda x: simulate(net, x), data.test)
    integers = logits(lambda x: run_integers(net, x), data.test)
    mistaken = torch.relu(simulated).argmax(1)  # the predictions with a ReLU after fc3
    return {
        "rule": net.rule,
        "scales": "channel" if per_channel else "tensor",
        "accuracy": accuracy(simulated, data.test),
        "integer_accuracy": accuracy(integers, data.test),
        "integer_logits_equal": bool((simulated == integers).all()),
        "no_positive_logit": int((simulated <= 0).all(1).sum()),
        "changed_by_relu_after_fc3": int((mistaken != simulated.argmax(1)).sum()),
    }


def _distributions(model: LeNet, activations: Activations) -> Json:
    """Compute histograms and ranges of weights, layer inputs and layer outputs, by layer."""
    return {
        "weights": {name: _distribution(model.weight(name)) for name in LAYERS},
        "inputs": {name: _distribution(activations.inputs[name]) for name in LAYERS},
        "outputs": {name: _distribution(activations.outputs[name]) for name in LAYERS},
    }


def _distribution(values: Tensor) -> Json:
    """Histogram, full range and three-sigma range of the values."""
    low, high = full_range(values)
    counts, edges = torch.histogram(values.flatten().double(), HISTOGRAM_BINS, range=(low, high))
    return {
        "full_range": [low, high],
        "three_sigma_range": list(three_sigma_range(values)),
        "counts": counts.long().tolist(),
        "edges": edges.tolist(),
    }


# --- over seeds -------------------------------------------------------------------------------------------------------


def summarize(runs: list[Json]) -> Json:
    """Return mean accuracies and paired differences with 95 % confidence intervals over the seeds."""
    base = [run["float"] for run in runs]
    int8 = [
        {"rule": row["rule"], "scales": row["scales"], **interval(column), "minus_float": difference(column, base)}
        for index, row in enumerate(runs[0]["int8"])
        for column in [[run["int8"][index]["accuracy"] for run in runs]]
    ]
    columns = {
        (row["bits"], row["method"]): [run["weight_only"][index]["accuracy"] for run in runs]
        for index, row in enumerate(runs[0]["weight_only"])
    }
    weight_only = [
        {"bits": bits, "method": method, **interval(column), "minus_float": difference(column, base)}
        for (bits, method), column in columns.items()
    ]
    return {
        "float": interval(base),
        "int8": int8,
        "weight_only": weight_only,
        "gptq_minus_rtn": [{"bits": b, **difference(columns[b, "gptq"], columns[b, "rtn"])} for b in BITS],
        "gptq_minus_max_abs": [{"bits": b, **difference(columns[b, "gptq"], columns[b, "max-abs"])} for b in BITS],
    }


def interval(values: list[float]) -> Json:
    """Mean and Student's t confidence interval; low and high are None for a single value."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(student_t.ppf((1 + CONFIDENCE_LEVEL) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def difference(values: list[float], others: list[float]) -> Json:
    """Interval of the differences paired by seed, with a verdict on the sign: better, worse, equal, or not shown."""
    found = interval([a - b for a, b in zip(values, others, strict=True)])
    return {**found, "verdict": _verdict(found)}


def _verdict(found: Json) -> str:
    """Whether the interval of a difference shows a sign."""
    if found["low"] is None:
        return "not shown"
    if found["low"] == found["high"] == 0:
        return "equal"
    if found["low"] > 0:
        return "better"
    return "worse" if found["high"] < 0 else "not shown"


# --- as text ----------------------------------------------------------------------------------------------------------


def table(results: Json) -> str:
    """The results as text for a terminal; accuracies in per cent, differences in percentage points."""
    summary, settings = results["summary"], results["settings"]
    name, images, seeds = results["data"]["name"], results["data"]["test_images"], settings["seeds"]
    lines = [
        f"LeNet (biases: {settings['bias']}) on {name}: {seeds} trained models, {images} test images",
        "",
        "distributions (seed 0)      full range        mean +- 3 sigma",
        *_range_lines(results["distributions"]),
        "",
        f"{'accuracy on the test split, %':44}    mean     {_interval_head(seeds)}   over float",
        f"  {'float32':42}{_percent(summary['float'])}",
    ]
    for row in summary["int8"]:
        label = f"int8, all of it, {row['rule']}, per {row['scales']}"
        lines.append(f"  {label:42}{_percent(row)}   {_points(row['minus_float'])}")
    labels = {"max-abs": "max-abs per tensor", "rtn": "nearest per channel", "gptq": "GPTQ per channel"}
    for row in summary["weight_only"]:
        label = f"{row['bits']}-bit weights, {labels[row['method']]}"
        lines.append(f"  {label:42}{_percent(row)}   {_points(row['minus_float'])}")
    lines += ["", f"{'difference of accuracy, points':44}    mean     {_interval_head(seeds)}"]
    int8 = summary["int8"][0]["minus_float"]
    lines.append(f"  {'int8 max-abs per tensor minus float':42}{_percent(int8, '+')}   {_margin_verdict(int8)}")
    for other, label in (("rtn", "nearest"), ("max_abs", "max-abs")):
        for row in summary[f"gptq_minus_{other}"]:
            words = f"{row['bits']} bits, GPTQ minus {label}"
            lines.append(f"  {words:42}{_percent(row, '+')}   {row['verdict']}")
    return "\n".join([*lines, "", *_integer_lines(results["runs"], images)])


def _range_lines(distributions: Json) -> list[str]:
    lines = []
    for kind, layers in distributions.items():
        for layer, found in layers.items():
            (low, high), (left, right) = found["full_range"], found["three_sigma_range"]
            lines.append(f"  {f'{layer} {kind}':24}  ({low:7.2f}, {high:6.2f})   ({left:7.2f}, {right:6.2f})")
    return lines


def _margin_verdict(found: Json) -> str:
    """Say whether the interval shows that int8 loses at most ACCURACY_MARGIN."""
    if found["low"] is None or found["low"] < -ACCURACY_MARGIN <= found["high"]:
        return f"not shown to be within {100 * ACCURACY_MARGIN} points"
    return (
        f"within {100 * ACCURACY_MARGIN} points"
        if found["low"] >= -ACCURACY_MARGIN
        else f"not within {100 * ACCURACY_MARGIN} points"
    )


def _interval_head(seeds: int) -> str:
    return "95 % interval" if seeds > 1 else "(1 seed)     "


def _percent(row: Json, sign: str = "") -> str:
    text = f"{100 * row['mean']:{sign}8.2f}"
    if row["low"] is None:
        return text + " " * 17
    bounds = f"{100 * row['low']:{sign}.2f} to {100 * row['high']:{sign}.2f}"
    return f"{text}{bounds:>17}"


def _points(row: Json) -> str:
    return f"{100 * row['mean']:+7.2f}"


def _integer_lines(runs: list[Json], images: int) -> list[str]:
    """Lines that say whether the two paths agree, and what a ReLU after fc3 would change."""
    rows = [row for run in runs for row in run["int8"]]
    unequal = sum(not row["integer_logits_equal"] for row in rows)
    verdict = "equal bit for bit" if unequal == 0 else f"UNEQUAL in {unequal}"
    first = runs[0]["int8"][0]
    return [
        f"integer path against the simulated one: {len(rows)} int8 models x {images} images, logits {verdict}",
        f"a ReLU after fc3 would change {first['changed_by_relu_after_fc3']} of {images} predictions "
        f"({first['no_positive_logit']} images have no positive logit; seed 0, max-abs per tensor)",
    ]
