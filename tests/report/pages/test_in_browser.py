"""The pages in a real Chromium: nothing complains, all answers to mouse and keyboard, nothing runs off the side."""

from __future__ import annotations

import json

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
def test_no_page_complains_or_scrolls_sideways(window, report, preview, width, dark):
    for page in (report, preview):
        window.open(page, width=width, dark=dark)
        assert window.run("return document.documentElement.scrollWidth") <= width
        assert window.complaints() == []
        ground = window.run("return getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") != dark


def test_a_class_that_is_a_script_is_shown_and_never_run(window, report):
    window.open(report)
    assert window.run("return document.querySelectorAll('script:not([type])').length") == 1
    assert HOSTILE in window.run("return document.getElementById('class-table').textContent")


def test_a_table_sorts_both_ways_and_filters(window, report):
    window.open(report)
    recall = "return [...document.querySelectorAll('#class-table tbody tr')].map(r => +r.cells[4].dataset.value)"
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
        "const f = document.querySelector('input[data-filter*=provenance]'); f.value = 'recipeseed'; "
        "f.dispatchEvent(new Event('input'))"
    )
    shown = window.run(
        "return [...document.querySelectorAll('#provenance-table tbody tr')].filter(r => !r.hidden).length"
    )
    assert shown == 1


def test_hovering_names_wells_cells_of_the_matrix_points_and_words(window, report):
    window.open(report)
    window.run("document.querySelector('.answers dfn').focus()")
    assert "every class counts the same" in window.run(TIP)
    window.hover("#plates svg circle.judged")
    assert "class: " in window.run(TIP) and "probability of the true class" in window.run(TIP)
    window.hover("#confusion canvas", 0.5, 0.5)
    assert "sites" in window.run(TIP)
    window.press("#embedding canvas", "ArrowRight")
    assert "part: " in window.run(TIP) and "predicted: " in window.run(TIP)
    assert window.run(
        "return getComputedStyle(document.querySelector('#tip i')).backgroundImage"
    ).startswith('url("data:')


def test_replicates_are_joined_where_the_pointer_is_or_all_of_them(window, report):
    window.open(report)
    drawn = "return document.querySelector('#embedding canvas').toDataURL()"
    plain = window.run(drawn)
    window.click("#embedding input[type=checkbox]")
    assert window.run(drawn) != plain
    window.click("#embedding input[type=checkbox]")
    assert window.run(drawn) == plain
    assert window.complaints() == []


def test_the_keyboard_walks_plates_and_matrix(window, report):
    window.open(report)
    window.press("#plates svg", "ArrowRight")
    first = window.run(TIP)
    window.press("#plates svg", "ArrowRight")
    assert first and window.run(TIP) != first
    window.press("#confusion canvas", "ArrowDown")
    assert "sites" in window.run("return document.querySelector('#confusion output').textContent")
    window.press("#plates svg", "Escape")
    assert window.run(TIP) == ""


def test_wells_are_coloured_by_what_is_chosen(window, report):
    window.open(report)
    fill = "return document.querySelector('#plates circle:not(.none)').style.fill"
    before = window.run(fill)
    window.run(
        "const s = document.querySelector('#plates select'); s.value = 'class'; s.dispatchEvent(new Event('change'))"
    )
    assert window.run(fill) != before
    assert window.run("return document.querySelectorAll('#plates .legend .swatch').length") == 8


def test_the_data_of_a_figure_is_saved_as_csv_that_no_spreadsheet_runs(window, report):
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


def test_a_link_opens_what_it_leads_to(window, report):
    window.open(report)
    window.run("document.querySelectorAll('details').forEach(d => { d.open = false })")
    window.run("location.hash = document.querySelector('#class-table a').getAttribute('href')")
    opened = window.run(
        "return new Promise(done => setTimeout(() => done(document.querySelectorAll('details[open]').length), 200))"
    )
    assert opened == 1


def test_it_prints_unfolded(window, report):
    window.open(report)
    window.run("document.querySelectorAll('details').forEach(d => { d.open = false })")
    folded = len(window.run("return document.body.innerText"))
    assert window.pdf().startswith(b"%PDF")
    assert len(window.run("return document.body.innerText")) > folded


def test_it_prints_on_white_from_a_dark_screen_and_splits_no_short_table(window, report):
    window.open(report, dark=True)
    style = "return getComputedStyle(document.{}).{}"
    drawn = "return document.querySelector('#confusion canvas').toDataURL()"
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


def test_on_paper_every_plate_is_drawn(window, preview, tmp_path):
    write_images(tmp_path / "data", make_index(plates=30, rows=1, columns=8, sites=1))
    window.open(write_preview(open_dataset(tmp_path / "data")))
    drawn = "return document.querySelectorAll('.plates svg').length"
    assert window.run(drawn) == 24
    window.pdf()
    assert window.run(drawn) == 30


def test_names_of_rows_and_columns_of_a_plate_are_no_larger_than_text(window, report, preview):
    for page in (report, preview):
        for width in (420, 1000, 1920):
            window.open(page, width=width)
            tall = (
                "return document.querySelector('.plates svg text').getBoundingClientRect().height"
            )
            assert 8 <= window.run(tall) <= 26


def test_the_theme_can_be_turned(window, report):
    window.open(report)
    window.click("button.theme")
    assert (
        window.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    )


def test_without_scripts_the_scores_and_the_cells_are_there(window, report):
    window.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        window.open(report)
        text = json.dumps(window.devtools("DOM.getDocument", depth=-1))
    finally:
        window.devtools("Emulation.setScriptExecutionDisabled", value=False)
    assert "surest wrong" in text and "balanced accuracy" in text
