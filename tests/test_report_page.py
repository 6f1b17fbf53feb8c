"""The page about a run in a browser: it uses the width of the screen, fits a phone, and prints on few pages."""

import re
import shutil

import pytest
from playwright import sync_api

from facevae_jax.reporting.write import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def file(workdir, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_report(workdir, output)
    return output


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


def open_page(browser, file, *, width=1440, scheme="light"):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(file.as_uri())
    return page


def test_the_width_of_a_screen_is_used(browser, file):
    page = open_page(browser, file)
    right = page.evaluate("""() => [...document.querySelectorAll("main")].map((main) =>
        Math.max(...[...main.querySelectorAll("img")].map((image) => image.getBoundingClientRect().right)))""")
    assert 1300 < right[0] <= 1440
    for id in ("attributes", "edits", "samples", "training", "map", "settings"):
        inner = page.locator(f"#{id} > .explanation ~ *").last.bounding_box()
        assert inner["width"] > 0.9 * 1440, id


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_nothing_is_wider_than_the_screen(browser, file, width):
    page = open_page(browser, file, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_it_prints_on_few_light_pages(browser, file):
    page = open_page(browser, file, scheme="dark")
    assert len(re.findall(rb"/Type */Page\b", page.pdf(prefer_css_page_size=True))) <= 6
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"


def test_ink_and_ground_change_places_on_a_dark_screen(browser, file):
    shades = []
    for scheme in ("light", "dark"):
        page = open_page(browser, file, scheme=scheme)
        colors = page.evaluate("""() => ["color", "backgroundColor"].map((name) =>
            getComputedStyle(document.documentElement)[name].match(/\\d+/g).map(Number))""")
        shades.append([sum(color) for color in colors])
    (ink, ground), (dark_ink, dark_ground) = shades
    assert ink < 150 < 600 < ground
    assert dark_ground < 150 < 600 < dark_ink
