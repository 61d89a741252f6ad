"""Charts of a page as files: the same marks as SVG, PNG and PDF."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from PIL import Image

from perturbjax.report.chart_files import write_charts
from perturbjax.report.svg import Chart


def make_chart(title: str) -> Chart:
    chart = Chart((0, 1), (0, 1), title, "a chart", "x", width=200, height=120)
    chart.grid([0, 1], [0, 1])
    chart.line([0, 1], [0, 1], "dashed", 1)
    chart.bar(0, 0.5, 0.5)
    chart.dots([0.9], [0.1], "test", ["a <tip>"])
    return chart


def test_charts_are_written_as_svg_and_png_of_the_same_size(tmp_path):
    charts = [make_chart(f"chart <{number}>") for number in range(4)]
    svg, png, pdf = write_charts(charts, tmp_path / "figure")
    assert pdf.read_bytes().startswith(b"%PDF")
    root = ElementTree.parse(svg).getroot()
    size = int(root.get("width")), int(root.get("height"))
    assert size == (3 * 200 + 2 * 12, 2 * 120 + 12)
    text = svg.read_text()
    assert text.count('class="dot test"') == 4 and "chart &lt;3&gt;" in text
    picture = Image.open(png).convert("RGB")
    assert picture.size == (2 * size[0], 2 * size[1])
    colors = {color for _, color in picture.getcolors(1 << 20)}
    assert {(213, 94, 0), (0, 114, 178), (255, 255, 255)} <= colors


def test_files_of_the_same_chart_are_equal(tmp_path):
    first = write_charts([make_chart("a")], tmp_path / "one")
    second = write_charts([make_chart("a")], tmp_path / "two")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
