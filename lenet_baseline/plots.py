"""Draw the figures of a results.json as PNG; computes nothing but labels and positions."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptq.errors import InputError
from lenet_baseline.model import write_atomically

Json = dict[str, Any]

COLORS = {"float": "black", "max-abs": "tab:orange", "rtn": "tab:blue", "gptq": "tab:green"}
MARKERS = {"max-abs": "s", "rtn": "o", "gptq": "D"}
LABELS = {
    "max-abs": "max-abs, per tensor",
    "rtn": "round to nearest, per channel",
    "gptq": "GPTQ, per channel",
}


def draw(results: Json, out: Path) -> list[Path]:
    """Draw the four figures of a `results.json` to a folder; return their paths.

    Raises:
        InputError: the results lack a value that a figure shows, or have one that cannot be drawn.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in FIGURES.items():
        path, drawn = out / f"{name}.png", io.BytesIO()
        try:
            figure(results).savefig(drawn, format="png", dpi=130, metadata={"Software": None})
        except Exception as error:  # matplotlib raises many types, now or while it draws
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{path} cannot be drawn from {out / 'results.json'} ({reason}); run compare again"
            ) from error
        write_atomically(path, drawn.getvalue())
        paths.append(path)
    return paths


def _weights(results: Json) -> Figure:
    """Histograms of the weights of each layer."""
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    layers = results["distributions"]["weights"]
    panels = figure.subplots(1, len(layers))
    for axes, (name, found) in zip(panels, layers.items(), strict=True):
        _histogram(axes, found, "tab:gray")
        axes.set(title=f"{name}, {sum(found['counts'])} weights", xlabel="weight")
    panels[0].set_ylabel("weights per bin")
    _range_legend(figure, panels[0])
    figure.suptitle(f"Weights of each layer, trained on {results['data']['name']} (seed 0)")
    return figure


def _activations(results: Json) -> Figure:
    """Histograms of the inputs and outputs of each layer."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    kinds = {"inputs": "input of", "outputs": "output of"}
    panels = figure.subplots(2, len(results["distributions"]["inputs"]))
    for row, (kind, words) in zip(panels, kinds.items(), strict=True):
        for axes, (name, found) in zip(row, results["distributions"][kind].items(), strict=True):
            _histogram(axes, found, "tab:gray")
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.5)  # so that a bin with one activation is visible
            axes.set(title=f"{words} {name}", xlabel="activation")
        row[0].set_ylabel("activations per bin")
    _range_legend(figure, panels[0][0])
    images = results["settings"]["calibration_images"]
    figure.suptitle(
        f"Activations over {images} training images of {results['data']['name']} (seed 0), outputs before ReLU"
    )
    return figure


def _histogram(axes: Axes, found: Json, color: str) -> None:
    axes.stairs(found["counts"], found["edges"], fill=True, color=color, alpha=0.7)
    for edge in found["full_range"]:
        axes.axvline(edge, color="tab:red", linewidth=1.2, label="full range")
    for edge in found["three_sigma_range"]:
        axes.axvline(edge, color="tab:purple", linewidth=1.2, linestyle="--", label="mean ± 3 standard deviations")
    axes.margins(x=0.04)


def _range_legend(figure: Figure, axes: Axes) -> None:
    handles = axes.get_lines()
    figure.legend(handles=[handles[0], handles[2]], loc="outside lower center", ncols=2)


def _accuracy(results: Json) -> Figure:
    """Accuracy against bits per weight, with intervals over seeds."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    summary = results["summary"]
    widths = sorted({row["bits"] for row in summary["weight_only"]})
    axes.axhline(100 * summary["float"]["mean"], color=COLORS["float"], linewidth=1.2, label="float32")
    for place, (method, label) in enumerate(LABELS.items()):
        rows = [row for row in summary["weight_only"] if row["method"] == method]
        x = [
            widths.index(row["bits"]) + 0.07 * (place - 1) for row in rows
        ]  # side by side, so that intervals do not overlap
        _with_intervals(axes, x, rows, color=COLORS[method], marker=MARKERS[method], label=f"weights: {label}")
    whole = next(row for row in summary["int8"] if (row["rule"], row["scales"]) == ("max-abs", "tensor"))
    _with_intervals(
        axes, [widths.index(8) + 0.2], [whole], color=COLORS["max-abs"], marker="*", markersize=12,
        label="weights, activations, biases: max-abs int8",
    )  # fmt: skip
    axes.axhline(10, color="gray", linewidth=1, linestyle=":", label="guessing")
    axes.set_xticks(range(len(widths)), [str(bits) for bits in widths])
    axes.set_ylim(0, 105)
    axes.set(xlabel="bits per weight", ylabel="accuracy on the test split (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    axes.set_title(f"LeNet on {results['data']['name']}: {_over_seeds(results)}")
    return figure


def _over_seeds(results: Json) -> str:
    seeds = results["settings"]["seeds"]
    return f"mean and 95 % interval over {seeds} trained models" if seeds > 1 else "one trained model"


def _with_intervals(axes: Axes, x: list[float], rows: list[Json], **style: Any) -> None:
    mean = [100 * row["mean"] for row in rows]
    half = [100 * (row["high"] - row["mean"]) if row["high"] is not None else 0.0 for row in rows]
    axes.errorbar(x, mean, half, capsize=3, linewidth=1.6, **style)


def _layer_error(results: Json) -> Figure:
    """Relative error of each layer's output by method, a panel for each number of bits."""
    widths = sorted({row["bits"] for row in results["runs"][0]["weight_only"]}, reverse=True)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True)
    for axes, bits in zip(panels, widths, strict=True):
        for place, method in enumerate(LABELS):
            found = [
                row["layer_errors"]
                for run in results["runs"]
                for row in run["weight_only"]
                if (row["bits"], row["method"]) == (bits, method)
            ]
            for index, layer in enumerate(found[0]):
                x = index + 0.22 * (place - 1)
                values = [errors[layer] for errors in found]
                axes.plot([x] * len(values), values, MARKERS[method], color=COLORS[method], alpha=0.6, markersize=5)
        axes.set_yscale("log")
        axes.set_xticks(range(len(found[0])), list(found[0]))
        axes.grid(alpha=0.3, axis="y")
        axes.set(title=f"{bits}-bit weights", xlabel="layer")
    panels[0].set_ylabel("relative squared error of the layer's output")
    handles = [panels[0].plot([], [], MARKERS[m], color=COLORS[m], label=LABELS[m])[0] for m in LABELS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    seeds = results["settings"]["seeds"]
    figure.suptitle(
        f"Error of each layer on its calibration inputs, {results['data']['name']}; one mark a model ({seeds})"
    )
    return figure


FIGURES: dict[str, Callable[[Json], Figure]] = {
    "weights": _weights,
    "activations": _activations,
    "accuracy": _accuracy,
    "layer_error": _layer_error,
}
