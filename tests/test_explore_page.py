"""The page to explore a model with, in a browser: sliders, photographs, morphs, the download, bad uploads."""

import shutil

import numpy as np
import pytest
from PIL import Image

from facevae_jax.generation.photographs import read_photograph
from tests.explored import make_explorer, photograph, random_model, serving

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Nothing that would ask the network, or need a display, a GPU or a sandbox that root has none of.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def trained(browser, tiny_config, tmp_path_factory):  # after the browser, without which no model is made
    return random_model(tiny_config, tmp_path_factory.mktemp("explored"))


@pytest.fixture(scope="module")
def server(trained):
    with serving(make_explorer(trained)) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, loaded; that it asked nobody else and that nothing went wrong in it is checked at the end."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, accept_downloads=True)
    wrong, asked = [], []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(10_000)
    page.goto(server.address)
    settle(page)
    yield page
    page.close()
    assert not [line for line in wrong if "status of 400" not in line]
    assert {url.removeprefix("blob:").startswith(server.address) for url in asked} == {True}


def settle(page):
    """Waits for the picture of two faces."""
    page.wait_for_selector(".face[data-index='0'] img[src]")
    page.wait_for_selector("body:not(:has([aria-busy])) #download[href]")


def shown(page):
    """The picture's pixels, as the browser decoded them."""
    return page.evaluate("""() => {
        const image = document.getElementById("picture"), canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
    }""")


def changed(page, before):
    """The picture's pixels as soon as they are others than `before`."""
    for _ in range(200):
        if (now := shown(page)) != before:
            return now
        page.wait_for_timeout(25)
    raise AssertionError("the picture stayed as it was")


def test_sliders_move_the_picture_by_keyboard(page):
    slider = page.get_by_label("Dimension 3")
    start = shown(page)
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    changed(page, start)
    assert slider.input_value() == "0.3"
    assert slider.get_attribute("aria-valuetext") == "+0.3"
    page.wait_for_selector("#picture[alt$='Dimension 3 +0.3']")
    page.get_by_role("button", name="Reset sliders").click()
    page.wait_for_selector("#picture:not([alt*='Dimension'])")
    assert shown(page) == start
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out on a phone


def test_a_photograph_a_morph_and_the_download(page, trained, tmp_path):
    file = tmp_path / "anna <b>.png"
    file.write_bytes(photograph())
    before = shown(page)
    page.get_by_label("Photograph: From").set_input_files(file)
    reconstruction = np.reshape(changed(page, before), (32, 32, 4))[..., :3]
    expected = trained.reconstruct(read_photograph(file, resolution=32)[None])[0]
    np.testing.assert_array_equal(reconstruction, expected)
    page.wait_for_selector("#picture[alt='Face: photograph anna <b>.png']")

    before = shown(page)
    page.get_by_label("Morph").fill("0.5")
    middle = changed(page, before)
    page.get_by_label("Morph").fill("1")
    assert changed(page, middle) != before
    page.get_by_role("button", name="New face: From").click()
    changed(page, shown(page))

    settle(page)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download PNG").click()
    assert download.value.suggested_filename == "face.png"
    picture = np.asarray(Image.open(download.value.path()))
    np.testing.assert_array_equal(picture, np.reshape(shown(page), (32, 32, 4))[..., :3])


def test_a_photograph_is_dropped(page, trained):
    data = photograph(seed=3)
    before = shown(page)
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
    picture = np.reshape(changed(page, before), (32, 32, 4))[..., :3]
    np.testing.assert_array_equal(picture, trained.reconstruct(read_photograph(data, resolution=32)[None])[0])
    assert not page.locator("body.dragging").count()


def test_bad_uploads_are_told_on_the_page(page, tmp_path):
    alert, before = page.get_by_role("alert"), shown(page)
    for name, content, said in [
        ("large.png", bytes(20 * 2**20), "large.png has 20 MB: 10 MB are the most."),
        ("text.png", b"not an image", "The photograph cannot be read: cannot identify a PNG, JPEG or WEBP image."),
    ]:
        (tmp_path / name).write_bytes(content)
        page.get_by_label("Photograph: To").set_input_files(tmp_path / name)
        page.wait_for_selector(f"#problem:not([hidden]):text-is('{said}')")
        assert alert.is_visible()
    assert shown(page) == before
    page.get_by_label("Dimension 3").fill("1")
    page.wait_for_selector("#problem", state="hidden")  # what went well since makes it old news


def test_two_pages_hold_their_own_faces(page, browser, server):
    other = browser.new_page()
    other.goto(server.address)
    settle(other)
    before, others = shown(page), shown(other)
    assert before != others
    other.get_by_label("Dimension 3").fill("3")
    changed(other, others)
    page.get_by_label("Dimension 3").fill("0.1")
    page.wait_for_selector("#picture[alt*='Dimension']")  # else what is awaited next is there before
    page.get_by_label("Dimension 3").fill("0")
    page.wait_for_selector("#picture:not([alt*='Dimension'])")
    assert shown(page) == before
    other.close()
