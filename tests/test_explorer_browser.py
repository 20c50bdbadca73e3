"""The explorer in a browser: pointing, opening, selecting, menus, keyboard, accessibility."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from explored import EVIL, served, trained

import raymem
from raymem.show.explorer import explorer_page, explorer_section

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
    # Of playwright's own event loop, after its browser is closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def url(study, tmp_path_factory):
    section = explorer_section(raymem.open(study.store, data=study.examples))
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    path.write_text(explorer_page(section, "A small study"))
    return f"file://{path}"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser, url):
    """Opens the page at a width; fails if the browser complained by the end."""
    said, contexts = [], []

    def open_page(width=1280, at=None, **more):
        context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(at or url)
        page.locator("#explorer").scroll_into_view_if_needed()
        page.wait_for_selector("#explorer[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def place_of(page, row):
    """Where an example's point is on the screen."""
    page.locator(".explorer-canvas canvas").scroll_into_view_if_needed()
    box = page.locator(".explorer-canvas").bounding_box()
    x, y = page.evaluate("row => raymemExplorer.place(row)", row)
    return box["x"] + x, box["y"] + y


def most_memorized(study):
    rows = study.scores().to_pylist()
    known = [k for k, r in enumerate(rows) if r["memorization"] is not None]
    # Unlike others in both measures, so that its point is alone.
    return max(known, key=lambda k: (rows[k]["memorization"], rows[k]["curvature_out"])), rows


def test_pointing_shows_the_image_and_clicking_opens_it(study, opened):
    page = opened()
    row, rows = most_memorized(study)
    page.mouse.move(*place_of(page, row))
    tip = page.locator(".explorer-tip")
    tip.wait_for()
    words = tip.inner_text()
    assert rows[row]["example_id"] in words
    low, high = rows[row]["memorization_low"], rows[row]["memorization_high"]
    value = rows[row]["memorization"]
    shown = f"{value:.0f}" if value == 1 else f"{value:.3f}"
    assert f"memorization: {shown} [{low:.3f}, " in words, (high, words)
    tip.locator("img").wait_for()
    page.mouse.click(*place_of(page, row))
    panel = page.locator(".explorer-panel")
    panel.locator("h3", has_text=rows[row]["example_id"]).wait_for()
    panel.locator("canvas.explorer-strip").wait_for()
    n_in = rows[row]["n_in"]
    assert f"of {n_in} models that trained on it get it right" in panel.inner_text()
    assert "curvature, models without it" in panel.inner_text()
    assert page.evaluate("document.querySelector('.explorer-panel img').naturalWidth") == 8


def test_near_duplicates_and_relations_lead_to_other_examples(study, opened):
    page = opened()
    pairs = raymem.open(study.store).pairs.to_pylist()
    best = max(pairs, key=lambda p: p["influence"])
    ids = [r["example_id"] for r in study.scores().to_pylist()]
    panel = page.locator(".explorer-panel")
    page.evaluate("row => raymemExplorer.open(row)", ids.index(best["train_id"]))
    panel.locator("h4", has_text="Test examples it helps most").wait_for()
    panel.locator(".explorer-tile").first.click()
    panel.locator("h4", has_text="Training examples that help it most").wait_for()
    page.evaluate("raymemExplorer.open(6)")
    panel.locator("h4", has_text="Near duplicates").wait_for()
    assert ids[9] in panel.inner_text()
    panel.get_by_role("button", name="Close").click()
    assert "Click a point" in panel.inner_text()


def drag(page, start, stop):
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move((start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2, steps=3)
    page.mouse.move(*stop, steps=3)
    page.mouse.up()


def test_a_brush_fills_gallery_and_table_and_is_copied(study, opened):
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    assert page.locator(".explorer-count").inner_text().startswith("All 60 examples")
    row, rows = most_memorized(study)
    x, y = place_of(page, row)
    drag(page, (x - 25, y - 12), (x + 6, y + 12))
    page.locator(".explorer-count", has_text="of 60 examples selected").wait_for()
    ends = [float(page.locator(f"#explorer-{e}").input_value()) for e in ("x0", "x1", "y0", "y1")]
    inside = {
        r["example_id"]
        for r in rows
        if r["memorization"] is not None
        and ends[0] - 1e-3 <= r["memorization"] <= ends[1] + 1e-3
        and ends[2] * 0.999 <= r["curvature_out"] <= ends[3] * 1.001
    }
    assert rows[row]["example_id"] in inside
    shown = page.locator(".explorer-table .explorer-id").all_inner_texts()
    assert set(shown) == inside
    assert page.locator(".explorer-gallery .explorer-tile").count() == len(inside)
    page.get_by_role("button", name="Copy ids").click()
    page.locator(".explorer-copied", has_text="ids copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.split("\n")[:-1] == shown
    page.get_by_role("button", name="Copy CSV").click()
    page.locator(".explorer-copied", has_text="CSV copied").wait_for()
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[0].startswith("example_id,split,class,epsilon,memorization,memorization_low")
    assert len(lines) == 1 + len(inside)
    assert all(re.match(r'"train-\d+""\'><b>",train,"', line) for line in lines[1:])
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".explorer-count").inner_text().startswith("All 60 examples")


def test_menus_choose_measures_classes_and_scales(study, opened):
    page = opened()
    rows = study.scores().to_pylist()
    page.locator("#explorer-x").select_option(label="loss, models without it")
    page.locator(".explorer-table th", has_text="loss, models without it").wait_for()
    highest = max((r for r in rows if r["split"] == "train"), key=lambda r: r["loss_out"])
    first = page.locator(".explorer-table .explorer-id").first
    assert first.inner_text() == highest["example_id"]
    assert "mean cross entropy" in page.locator("#explorer-x-meaning").text_content()
    page.locator("#explorer-class").select_option(label=EVIL)
    of_class = [r for r in rows if r["split"] == "train" and r["label"] == 1]
    page.locator(".explorer-count", has_text=f"All {len(of_class)} examples").wait_for()
    page.locator("#explorer-log-x").check()
    page.wait_for_timeout(200)
    # Test examples have accuracy and loss: both splits are shown, with a legend.
    page.locator("#explorer-y").select_option("accuracy_out")
    page.locator("#explorer-class").select_option("")
    page.locator(".explorer-count", has_text="All 90 examples").wait_for()
    assert page.locator(".explorer-legend").is_visible()


def test_the_keyboard_does_what_the_mouse_does(study, opened):
    page = opened()
    page.locator(".explorer-plot").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.locator(".explorer-tip").wait_for()
    example_id = page.locator(".explorer-tip p").first.inner_text()
    page.keyboard.press("Enter")
    page.locator(".explorer-panel h3", has_text=example_id).wait_for()
    page.locator("#explorer-x0").fill("0.5")
    page.keyboard.press("Tab")
    expected = sum(r["memorization"] is not None and r["memorization"] >= 0.5
                   for r in study.scores().to_pylist())  # fmt: skip
    page.locator(".explorer-count", has_text=f"{expected} of 60 examples selected").wait_for()
    page.locator(".explorer-plot").focus()
    page.keyboard.press("Escape")
    page.locator(".explorer-count", has_text="All 60").wait_for()


@pytest.mark.parametrize(
    ("width", "scheme"), [(390, "light"), (390, "dark"), (768, "dark"), (1280, "light")]
)
def test_no_width_is_too_small_and_axe_finds_nothing(study, opened, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(width, color_scheme=scheme)
    page.locator(".explorer-tile").first.click()
    page.locator("canvas.explorer-strip").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found = Axe().run(page)
    assert found.response["violations"] == [], found.generate_report()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_names_that_are_markup_are_text(study, opened):
    page = opened()
    page.locator("#explorer-class").select_option(label=EVIL)
    page.wait_for_timeout(200)
    assert EVIL in page.locator(".explorer-gallery .explorer-tile").first.inner_text()
    assert page.evaluate("document.querySelectorAll('#explorer .explorer-gallery b').length") == 0


def test_plots_are_saved(study, opened):
    page = opened()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save plot as SVG").click()
    svg = saved.value.path().read_text()
    assert svg.startswith("<svg")
    assert "curvature, models without it" in svg
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save plot as PNG").click()
    from PIL import Image

    with Image.open(saved.value.path()) as image:
        assert np.asarray(image).std() > 0


def test_a_served_page_does_the_same(study, opened):
    row, rows = most_memorized(study)
    with served(study) as address:
        page = opened(at=address)
        page.mouse.move(*place_of(page, row))
        page.locator(".explorer-tip img").wait_for()
        page.mouse.click(*place_of(page, row))
        panel = page.locator(".explorer-panel")
        panel.locator("canvas.explorer-strip").wait_for()
        assert rows[row]["example_id"] in panel.inner_text()
        assert f"of {rows[row]['n_in']} models that trained on it" in panel.inner_text()
        shown = panel.locator("tr", has_text="curvature, models without it").first.inner_text()
        assert f"{rows[row]['curvature_out']:.3f}" in shown
        page.locator("#explorer-x").select_option("loss_out")
        page.locator(".explorer-table th", has_text="loss, models without it").wait_for()


def test_a_notebook_shows_it_in_a_frame(study, browser, tmp_path):
    frame = raymem.open(study.store, data=study.examples).explore()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><p>A cell{frame._repr_html_()}")
    page = browser.new_page(viewport={"width": 1000, "height": 950})
    page.goto(f"file://{tmp_path / 'notebook.html'}")
    inside = page.frame_locator("iframe")
    inside.locator("#explorer[data-ready]").wait_for()
    inside.locator(".explorer-tile img").first.wait_for()
    inside.locator(".explorer-tile").first.click()
    inside.locator("canvas.explorer-strip").wait_for()
    page.close()


def test_the_report_has_it(study, opened, tmp_path):
    from raymem.show import write_report

    path = write_report(study.store, study.examples)
    page = opened(at=f"file://{path}")
    page.locator(".explorer-tile img").first.wait_for()
    assert page.locator(".explorer-count").inner_text().startswith("All 60 examples")


@pytest.mark.slow
def test_the_benchmark_measures_and_brushes():
    from benchmarks.explorer import in_a_browser

    rows = in_a_browser(quick=True)
    assert [row.goal for row in rows] == ["15 MB", "3,000 ms", "", "100 ms at 90%"]
    assert "of 5,000 examples selected" in rows[-1].result
