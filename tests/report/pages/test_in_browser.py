"""The pages in a real Chromium: no errors, mouse and keyboard work, and the width fits."""

from __future__ import annotations

import json
import time

import pytest

from perturbjax.dataset import open_dataset
from perturbjax.report.pages.preview import write_preview
from perturbjax.report.run_page import write_report
from report.screens import HOSTILE, make_index, make_run, write_images

from . import browser as chromium

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (chromium.DRIVER and chromium.BROWSER),
        reason="no chromium or no chromedriver is installed",
    ),
]
TIP = "const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.textContent"


@pytest.fixture(scope="module")
def window():
    with chromium.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("browser") / "run"
    make_run(path, first_class=HOSTILE, images=True)
    return write_report(path)


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    path = tmp_path_factory.mktemp("browser") / "data"
    write_images(path, make_index())
    return write_preview(open_dataset(path))


@pytest.mark.parametrize("width", [420, 1280, 1920])
@pytest.mark.parametrize("dark", [False, True])
def test_pages_have_no_errors_and_no_sideways_scrolling(window, report, preview, width, dark):
    for page in (report, preview):
        window.open(page, width=width, dark=dark)
        assert window.run("return document.documentElement.scrollWidth") <= width
        assert window.complaints() == []
        ground = window.run("return getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") != dark


def test_class_name_with_a_script_is_text(window, report):
    window.open(report)
    assert window.run("return document.querySelectorAll('script:not([type])').length") == 1
    assert HOSTILE in window.run("return document.getElementById('class-table').textContent")


def test_table_sorts_and_filters(window, report):
    window.open(report)
    recall = (
        "return [...document.querySelectorAll('#class-table tbody tr')]"
        ".map(r => +r.cells[4].dataset.value)"
    )
    window.click("#class-table th:nth-child(5) button")
    assert window.run(recall) == sorted(window.run(recall), reverse=True)
    window.click("#class-table th:nth-child(5) button")
    assert window.run(recall) == sorted(window.run(recall))
    sort = window.run(
        "return document.querySelector('#class-table th:nth-child(5)').getAttribute('aria-sort')"
    )
    assert sort == "ascending"
    window.run(
        "document.querySelectorAll('details').forEach(d => { d.open = true }); "
        "const f = document.querySelector('input[data-filter*=provenance]'); f.value = "
        "'recipeseed'; f.dispatchEvent(new Event('input'))"
    )
    shown = window.run(
        "return [...document.querySelectorAll('#provenance-table tbody tr')].filter(r => "
        "!r.hidden).length"
    )
    assert shown == 1


def test_tooltips_describe_wells_matrix_points_and_terms(window, report):
    window.open(report)
    window.run("document.querySelector('.answers dfn').focus()")
    assert "equal weight" in window.run(TIP)
    window.hover("#plates svg circle.tested")
    assert "class: " in window.run(TIP) and "probability of the true class" in window.run(TIP)
    window.hover("#confusion canvas", 0.5, 0.5)
    assert "sites" in window.run(TIP)
    window.press("#embedding canvas", "ArrowRight")
    assert "part: " in window.run(TIP) and "predicted: " in window.run(TIP)
    assert window.run(
        "return getComputedStyle(document.querySelector('#tip i')).backgroundImage"
    ).startswith('url("data:')


def test_replicates_are_joined_on_request(window, report):
    window.open(report)
    drawn = "return document.querySelector('#embedding canvas').toDataURL()"
    plain = window.run(drawn)
    window.click("#embedding input[type=checkbox]")
    assert window.run(drawn) != plain
    window.click("#embedding input[type=checkbox]")
    assert window.run(drawn) == plain
    assert window.complaints() == []


def test_keyboard_moves_in_plates_and_matrix(window, report):
    window.open(report)
    window.press("#plates svg", "ArrowRight")
    first = window.run(TIP)
    window.press("#plates svg", "ArrowRight")
    assert first and window.run(TIP) != first
    window.press("#confusion canvas", "ArrowDown")
    assert "sites" in window.run("return document.querySelector('#confusion output').textContent")
    window.press("#plates svg", "Escape")
    assert window.run(TIP) == ""


def test_wells_have_the_selected_color(window, report):
    window.open(report)
    fill = "return document.querySelector('#plates circle:not(.none)').style.fill"
    before = window.run(fill)
    window.run(
        "const s = document.querySelector('#plates select'); s.value = 'class'; "
        "s.dispatchEvent(new Event('change'))"
    )
    assert window.run(fill) != before
    assert window.run("return document.querySelectorAll('#plates .legend .swatch').length") == 8


def test_data_of_a_figure_are_saved_as_csv(window, report):
    window.open(report)
    window.run(
        "window.saved = null; "
        "URL.createObjectURL = blob => { blob.text().then(t => { window.saved = t }); return '#'; }"
    )
    window.click('button[data-name="confusion"]')
    rows = window.run(
        "return new Promise(done => setTimeout(() => done(window.saved), 200))"
    ).splitlines()
    assert rows[0] == "true,predicted,sites" and any(
        '"<script>alert(""DMSO"")</script>"' in row for row in rows
    )


def test_link_opens_its_target(window, report):
    window.open(report)
    window.run("document.querySelectorAll('details').forEach(d => { d.open = false })")
    window.run("location.hash = document.querySelector('#class-table a').getAttribute('href')")
    opened = window.run(
        "return new Promise(done => setTimeout(() => "
        "done(document.querySelectorAll('details[open]').length), 200))"
    )
    assert opened == 1


def test_printing_unfolds_details(window, report):
    window.open(report)
    window.run("document.querySelectorAll('details').forEach(d => { d.open = false })")
    folded = len(window.run("return document.body.innerText"))
    assert window.pdf().startswith(b"%PDF")
    assert len(window.run("return document.body.innerText")) > folded


def test_printing_uses_a_white_background(window, report):
    window.open(report, dark=True)
    style = "return getComputedStyle(document.{}).{}"
    # The page redraws after the event of the media change: wait for it.
    drawn = (
        "return new Promise(done => setTimeout(() => "
        "done(document.querySelector('#confusion canvas').toDataURL()), 200))"
    )
    dark = window.run(drawn)
    window.devtools("Emulation.setEmulatedMedia", media="print")
    assert window.run(style.format("body", "backgroundColor")) == "rgb(255, 255, 255)"
    assert window.run(style.format("querySelector('.wide')", "breakInside")) == "avoid"
    assert window.run(drawn) != dark
    window.devtools("Emulation.setEmulatedMedia", media="")
    window.open(report)
    window.click("button.theme")
    window.devtools("Emulation.setEmulatedMedia", media="print")
    assert window.run(style.format("body", "backgroundColor")) == "rgb(255, 255, 255)"
    window.devtools("Emulation.setEmulatedMedia", media="")


def test_printing_draws_every_plate(window, preview, tmp_path):
    write_images(tmp_path / "data", make_index(plates=30, rows=1, columns=8, sites=1))
    window.open(write_preview(open_dataset(tmp_path / "data")))
    drawn = "return document.querySelectorAll('.plates svg').length"
    assert window.run(drawn) == 24
    window.pdf()
    assert window.run(drawn) == 30


def test_plate_labels_have_the_size_of_text(window, report, preview):
    for page in (report, preview):
        for width in (420, 1000, 1920):
            window.open(page, width=width)
            tall = (
                "return document.querySelector('.plates svg text').getBoundingClientRect().height"
            )
            assert 8 <= window.run(tall) <= 26


def test_theme_button_switches_colors(window, report):
    window.open(report)
    window.click("button.theme")
    assert (
        window.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    )


def test_page_without_scripts_has_scores_and_cells(window, report):
    window.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        window.open(report)
        text = json.dumps(window.devtools("DOM.getDocument", depth=-1))
    finally:
        window.devtools("Emulation.setScriptExecutionDisabled", value=False)
    assert "most confident wrong" in text and "balanced accuracy" in text


def test_click_enlarges_a_picture_and_shows_one_channel(window, report):
    window.open(report)
    window.click(".shot button")
    is_open = "return document.querySelector('dialog.viewer').open"
    deadline = time.monotonic() + 10
    while not window.run(is_open) and time.monotonic() < deadline:
        time.sleep(0.05)
    pixels = (
        "const c = document.querySelector('dialog canvas'); "
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    change = (
        "const n = document.querySelector(arguments[0]); n[arguments[1]] = arguments[2]; "
        "n.dispatchEvent(new Event('input'))"
    )
    assert window.run(is_open)
    mixed = window.run(pixels)
    window.run(change, "dialog input[type=checkbox]", "checked", False)
    window.run(change, "dialog select", "value", "1")
    gray = window.run(pixels)
    # One channel without outlines is gray; more brightness never makes a pixel darker.
    assert gray[0::4] == gray[1::4] == gray[2::4] != mixed[0::4]
    assert "ER" in window.run("return document.querySelector('dialog .note').textContent")
    window.run(change, "dialog input[type=range]", "value", "2")
    bright = window.run(pixels)
    assert all(b >= a for a, b in zip(gray, bright, strict=True)) and bright != gray
    window.run("[...document.querySelectorAll('dialog button')].pop().click()")
    assert not window.run(is_open)
