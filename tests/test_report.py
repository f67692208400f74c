"""The page of a quantized checkpoint: it stands by itself, and shows what was recorded."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from gptq import InputError, QuantConfig, quantize
from gptq.checkpoint.reader import Source
from gptq.evaluation import charts, evaluate, quality, report
from gptq.evaluation.charts import Chart, Series
from gptq.evaluation.quality import Measurement
from gptq.inference.load import load
from gptq.output import record, results, verify
from tests.conftest import MakeModel

FAST = QuantConfig(bits=3, group_size=32, num_samples=4, seq_len=32)


class Page(HTMLParser):
    """Counts elements, and collects texts and what an attribute could fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.fetches: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.fetches += [
            f"{name}={value}" for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}
        ]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_histograms_count_every_weight_and_code_where_it_lies() -> None:
    W = torch.tensor([[-2.0, -1.99, 0.0, 2.0], [0.05, -0.05, 1.0, 0.0]])
    codes = torch.tensor([[0, 1, 7, 7], [3, 3, 3, 0]], dtype=torch.uint8)
    found = results.weight_histogram(W) | results.code_histogram(codes, 3)
    assert found["weight_range"] == 2.0
    assert found["code_histogram"] == [2, 1, 0, 3, 0, 0, 0, 2]
    expected = [0] * 40
    for w in W.flatten().tolist():  # bins of 0.1 from -2
        expected[min(int((w + 2) / 0.1 + 1e-6), 39)] += 1
    assert found["weight_histogram"] == expected
    assert results.weight_histogram(torch.zeros(2, 2))["weight_histogram"][20] == 4
    eight = results.code_histogram(torch.tensor([[0, 3, 4, 255]], dtype=torch.uint8), 8)["code_histogram"]
    assert (len(eight), eight[0], eight[1], eight[63]) == (64, 2, 1, 1)


def test_the_record_holds_what_the_files_hold(make_model: MakeModel, text_file: str, tmp_path: Path) -> None:
    source, out = make_model("gpt2"), tmp_path / "out"
    made = quantize(source, out, FAST, calibration=text_file)
    recorded = record.read_record(out)
    content = verify.inspect(out)
    assert recorded.sizes is not None
    assert recorded.sizes.to_dict() == {
        "bits_per_weight": content.bits_per_weight,
        "quantized_bytes_before": 4 * sum(layer.outputs * layer.inputs for layer in content.layers),
        "quantized_bytes_after": content.quantized_bytes,
        "file_bytes_before": made.bytes_before,
        "file_bytes_after": made.bytes_after,
        "calibration_tokens": 4 * 32,
    }
    network = load(out)
    for layer in recorded.layers:
        linear = network.get_submodule(layer.name or "")
        codes = (linear.weight / linear.scales.T.float()[:, linear.g_idx]).round().long() + 4  # type: ignore[operator,index,arg-type]
        assert layer.code_histogram == torch.bincount(codes.flatten(), minlength=8).tolist()
        stored = Source(source).read(f"{layer.stored}.weight")
        assert layer.weight_range == float(stored.abs().max())
        assert sum(layer.weight_histogram or []) == stored.numel() == (layer.outputs or 0) * (layer.inputs or 0)


def test_the_page_is_whole_by_itself_and_shows_every_layer(
    make_model: MakeModel, text_file: str, tmp_path: Path
) -> None:
    out = tmp_path / "<out> & more"
    quantize(make_model("llama"), out, FAST, calibration=text_file)
    found = json.loads(json.dumps(evaluate.summarize(torch.rand(3, 4).double(), 32).to_dict()))
    quality.add_measurement(out, Measurement(data="a.txt", original="x", **found))
    page, pictures = report.write_report(out)
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.open == []
    assert parsed.fetches == []
    assert not parsed.tags.keys() & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in text
    assert "@import" not in text
    assert "<out> & more" in parsed.text
    layers = record.read_record(out).layers
    assert parsed.tags["details"] == len(layers) == 14
    for layer in layers:
        assert f"{layer.stored}, as quantized, calibration data: {100 * (layer.error or 0):.3g} %" in parsed.text
    (measured,) = quality.read_measurements(out)
    assert f"{measured.kl:.4f}" in parsed.text
    assert {picture.stem for picture in pictures} == {"errors", "bits", "size", "coverage", "weights", "codes"}
    for picture in pictures:
        assert picture.parent == page.parent
        root = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert verify.verify(out).problems == []
    again, _ = report.write_report(out, tmp_path / "elsewhere")
    assert again.read_bytes() == page.read_bytes()


def test_what_a_record_lacks_is_left_out(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    quantize(source, out, QuantConfig(method="rtn", group_size=32))
    text = report.write_report(out)[0].read_text(encoding="utf-8")
    assert "Relative weight error" in text
    assert "Calibration tokens" not in text
    file = out / results.RECORD
    old = json.loads(file.read_text())
    del old["sizes"]
    old["config"]["method"] = "gptq"
    old["layers"] = [{key: e[key] for key in ("stored", "error", "rtn_error", "weight_sha256")} for e in old["layers"]]
    old["layers"][0]["heldout_error"] = 0.25
    file.write_text(json.dumps(old))
    page, pictures = report.write_report(out)
    assert [picture.name for picture in pictures] == ["errors.svg"]
    text = page.read_text(encoding="utf-8")
    assert "held-out data: 25 %" in text
    assert "Size of" not in text
    assert "Bits of a code" not in text
    assert "This record holds no histograms" in text
    file.unlink()
    with pytest.raises(InputError, match="has no quantization_record"):
        report.write_report(out)
    with pytest.raises(InputError, match="has no quantization_record"):
        report.write_report(tmp_path / "nowhere")


def test_bars_are_as_high_as_their_numbers() -> None:
    chart = Chart("t", "x", "y", [Series("a", [1.0, 3.0]), Series("b", [2.0, None])], "bars", ["p", "q"])
    paths = re.findall(r'class="c\d" d="M[\d.]+ ([\d.]+)V([\d.]+)h', charts.render_svg(chart))
    heights = [float(foot) - float(top) for foot, top in paths]
    assert heights == pytest.approx([heights[0], 3 * heights[0], 2 * heights[0]], abs=0.2)
    assert float(paths[2][0]) == float(paths[0][1])  # b stands on a
    assert charts.y_ticks(chart) == [0, 1, 2, 3]


def test_dots_spread_over_decades_stand_on_a_logarithmic_axis() -> None:
    chart = Chart("t", "x", "y", [Series("a", [0.001, 0.01, 0.1, None])], "dots", percent=True)
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', charts.render_svg(chart))]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert charts.y_ticks(chart) == pytest.approx([0.001, 0.01, 0.1])


def test_every_dot_is_seen_and_every_label_is_whole() -> None:
    same = [Series(name, [0.5, 0.5]) for name in "abc"]
    radii = [float(r) for r in re.findall(r' r="([\d.]+)"', charts.render_svg(Chart("t", "x", "y", same, "dots")))]
    assert radii[0] > radii[2] > radii[4] > 0  # what lies on top is smaller
    values = [1.0] * 31
    chart = Chart("t", "x", "y", [Series("a", values)], "bars", ticks={30: "0.4743"}, width=440)
    drawn = charts.render_svg(chart)
    (x,) = re.findall(r'<text x="([\d.]+)"[^>]*>0\.4743<', drawn)
    assert float(x) + charts.HALF_LETTER * 6 <= 440
