"""The page to explore a model with, in a browser: sliders, photographs, morphs, the download, bad uploads."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright import sync_api

from facevae_jax.data.sources.photographs import read_photograph
from tests.explored import make_explorer, photograph, serving

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
TIMEOUT_MS = 120_000  # ends a hang; never reached otherwise


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture(scope="module")
def url(trained):
    with serving(make_explorer(trained)) as (host, port):
        yield f"http://{host}:{port}/"


@pytest.fixture
def page(browser, url):
    """The page at a phone's width; afterwards checks that nothing failed in it and that it asked no other server."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(TIMEOUT_MS)
    failed, asked = [], []
    page.on("console", lambda message: failed.append(message.text))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_selector(".face[data-index='0'] img[src]")
    page.wait_for_selector("body:not(:has([aria-busy])) #download[href]")
    yield page
    page.close()
    assert not [line for line in failed if "status of 400" not in line]
    assert all(found.removeprefix("blob:").startswith(url) for found in asked)


def pixels(page):
    """The picture, as the browser decoded it: uint8 [32, 32, 3]."""
    values = page.evaluate("""() => {
        const image = document.getElementById("picture"), canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
    }""")
    return np.reshape(values, (32, 32, 4))[..., :3]


def picture_of(page, pattern):
    """The pixels of the picture with this description: both change together."""
    page.get_by_alt_text(re.compile(f"^Face: {pattern}$")).wait_for()
    return pixels(page)


def test_sliders_move_the_picture_by_keyboard(page):
    slider, start = page.get_by_label("Dimension 3"), pixels(page)
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert (picture_of(page, r".*; Dimension 3 \+0\.3") != start).any()
    assert (slider.input_value(), slider.get_attribute("aria-valuetext")) == ("0.3", "+0.3")
    page.get_by_role("button", name="Reset sliders").click()
    np.testing.assert_array_equal(picture_of(page, r"sample with seed \d+"), start)
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing is wider than the phone


def test_a_photograph_a_morph_and_the_download(page, trained, tmp_path):
    file = tmp_path / "anna <b>.png"
    file.write_bytes(photograph())
    page.get_by_label("Photograph: From").set_input_files(file)
    reconstruction = picture_of(page, r"photograph anna <b>\.png")
    np.testing.assert_array_equal(reconstruction, trained.reconstruct(read_photograph(file, resolution=32)[None])[0])

    page.get_by_label("Morph").fill("0.5")
    middle = picture_of(page, "50% from photograph .*")
    page.get_by_label("Morph").fill("1")
    assert (picture_of(page, r"sample with seed \d+") != middle).any()
    page.get_by_role("button", name="New face: From").click()
    page.wait_for_selector(".face[data-index='0']:not([aria-busy]) .origin:text-matches('sample')")
    assert page.get_by_label("Morph").input_value() == "0"

    with page.expect_download() as download:
        page.get_by_role("link", name="Download PNG").click()
    assert download.value.suggested_filename == "face.png"
    np.testing.assert_array_equal(np.asarray(Image.open(download.value.path())), pixels(page))


def test_a_photograph_is_dropped(page, trained):
    data = photograph(seed=3)
    transfer = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        list(data),
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    page.wait_for_selector("body.dragging .face.target[data-index='0']")
    page.dispatch_event("#dimensions", "drop", {"dataTransfer": transfer})
    picture = picture_of(page, "photograph dropped.png")
    np.testing.assert_array_equal(picture, trained.reconstruct(read_photograph(data, resolution=32)[None])[0])
    assert not page.locator("body.dragging").count()


def test_bad_uploads_show_the_reason(page, tmp_path):
    before = pixels(page)
    for name, content, reason in [
        ("large.png", bytes(20 * 2**20), "10 MB"),
        ("text.png", b"text", "PNG, JPEG or WEBP"),
    ]:
        (tmp_path / name).write_bytes(content)
        page.get_by_label("Photograph: To").set_input_files(tmp_path / name)
        page.get_by_role("alert").filter(has_text=reason).wait_for()
    np.testing.assert_array_equal(pixels(page), before)
    page.get_by_label("Dimension 3").fill("1")
    page.wait_for_selector("#problem", state="hidden")  # the next success clears it
