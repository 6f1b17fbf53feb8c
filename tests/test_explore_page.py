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
SETTLED_MS = 600  # longer than the page waits before it changes its address


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


def settled(page):
    """Waits until all is drawn and in the address, and returns the address."""
    page.wait_for_selector("body:not(:has([aria-busy])) #download[href]")
    page.wait_for_timeout(SETTLED_MS)
    return page.url


def shown_seeds(page):
    return [page.get_by_label(f"Seed: {name}").input_value() for name in ("From", "To")]


def type_seed(page, seed, *, name="From"):
    page.get_by_label(f"Seed: {name}").fill(str(seed))
    page.keyboard.press("Enter")


def test_a_typed_seed_draws_that_face(page, trained):
    type_seed(page, 12)
    expected = trained.decode(trained.sample_codes(1, prior="gaussian", seed=12))[0]
    np.testing.assert_array_equal(picture_of(page, "sample with seed 12"), expected)
    settled(page)
    page.get_by_text("How new faces are drawn").click()
    page.get_by_label("Prior").select_option("standard")
    page.get_by_label("Seed: From").press("Enter")  # the same seed from another prior
    settled(page)
    expected = trained.decode(trained.sample_codes(1, prior="standard", seed=12))[0]
    np.testing.assert_array_equal(pixels(page), expected)
    for wrong in ("-1", "4294967296", "1e3"):
        type_seed(page, wrong)
        page.get_by_role("alert").filter(has_text="from 0 to 4294967295").wait_for()
    np.testing.assert_array_equal(pixels(page), expected)


def test_a_copied_address_restores_the_page(page, browser):
    type_seed(page, 7)
    picture_of(page, "sample with seed 7")
    type_seed(page, 8, name="To")
    picture_of(page, "sample with seed 8")
    page.get_by_text("How new faces are drawn").click()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Morph").fill("0.25")
    page.get_by_label("Dimension 3").fill("1.5")
    page.get_by_text("Weak directions").click()
    page.get_by_label("Smile").fill("-2")
    before = picture_of(page, r"25% from .* seed 7 to .* seed 8; Smile −2\.0; Dimension 3 \+1\.5")  # noqa: RUF001
    address = settled(page)
    copy = browser.new_page()
    copy.goto(address)
    settled(copy)
    np.testing.assert_array_equal(pixels(copy), before)
    assert shown_seeds(copy) == ["7", "8"]
    values = [copy.get_by_label(name).input_value() for name in ("Temperature", "Morph", "Dimension 3", "Smile")]
    assert values == ["0.5", "0.25", "1.5", "-2"]
    assert copy.get_by_label("Smile").is_visible()  # it is moved, so the weak directions are open
    assert copy.url == address
    copy.close()


def test_back_undoes_and_forward_redoes(page, tmp_path):
    start, seeds = settled(page), shown_seeds(page)
    type_seed(page, 5)
    picture_of(page, "sample with seed 5")
    settled(page)
    slider = page.get_by_label("Dimension 3")
    for value in ("1", "2"):  # moves of one slider are one step back
        slider.fill(value)
        settled(page)
    (tmp_path / "face.png").write_bytes(photograph())
    page.get_by_label("Photograph: From").set_input_files(tmp_path / "face.png")
    last = picture_of(page, "photograph face.png.*")
    settled(page)
    for picture, value, seed in [(".*seed 5; Dimension 3.*", "2", "5"), (".*seed 5", "0", "5")]:
        page.go_back()
        picture_of(page, picture)
        assert (slider.input_value(), shown_seeds(page)[0]) == (value, seed)
    page.go_back()
    settled(page)
    assert (page.url, shown_seeds(page)) == (start, seeds)
    for _ in range(3):
        page.go_forward()
        settled(page)
    np.testing.assert_array_equal(pixels(page), last)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        *(("from=" + face, "from") for face in ("1", "-1,standard,1", "4294967296,standard,1", "1,mixture,1")),
        *(("from=" + face, "from") for face in ("1,standard,2.1", "1,standard,1,1", "1,standard,NaN", "<b>")),
        *(("to=", "to"), ("morph=1.01", "morph"), ("temperature=1e0", "temperature"), ("prior=constructor", "prior")),
        *(("dimension:3=" + value, "dimension:3") for value in ("3.1", "Infinity", "0x1", "")),
        *(("dimension:2=1", "dimension:2"), ("__proto__=1", "__proto__"), ("<img src=x onerror=alert(1)>=1", "<img")),
    ],
)
def test_what_is_not_valid_in_an_address_is_left_out(page, url, field, name):
    page.goto(f"{url}#dimension:1=0.5&{field}")
    page.get_by_role("status").filter(has_text=name).wait_for()
    page.get_by_alt_text(re.compile(r"^Face: sample with seed \d+; Dimension 1 \+0\.5$")).wait_for()
    assert page.get_by_label("Dimension 3").input_value() == "0"
    assert page.locator("img").count() == 3  # the picture and two thumbnails


def test_a_photograph_is_not_in_the_address(page, browser, tmp_path):
    (tmp_path / "anna.png").write_bytes(photograph())
    page.get_by_label("Photograph: From").set_input_files(tmp_path / "anna.png")
    picture_of(page, r"photograph anna\.png")
    address = settled(page)
    assert "anna" not in address
    copy = browser.new_page()
    copy.goto(address)
    copy.get_by_role("status").filter(has_text="photographs").wait_for()
    assert shown_seeds(copy)[0]
    assert shown_seeds(copy)[1] == shown_seeds(page)[1]
    copy.close()


def test_weak_directions_are_folded(page):
    assert page.get_by_label("Glasses").is_visible()
    assert not page.get_by_label("Smile").is_visible()
    page.get_by_text("Weak directions").click()
    assert page.get_by_label("Smile").is_visible()


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
