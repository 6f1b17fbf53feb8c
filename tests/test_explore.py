"""The page to explore a model with: its calls over HTTP, what it refuses, and the command."""

import base64
import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.data.dataset import Drawn
from facevae_jax.data.sources.photographs import read_photograph
from facevae_jax.exploring import sliders
from facevae_jax.exploring.explorer import MAX_PHOTOGRAPH_BYTES
from facevae_jax.exploring.server import MAX_JSON_BYTES, listen
from facevae_jax.generation import sheets
from facevae_jax.latents.paths import lerp
from facevae_jax.trained.ranking import attribute_scores
from tests import explored
from tests.conftest import CHEAP, REPOSITORY
from tests.explored import ask, pixels, post, to_latent, to_text

MOVED = "dimension:3"
ZERO = to_text(np.zeros(8))
GOOD = {"faces": [ZERO], "alphas": {MOVED: 1.0}}
DRAW = {"prior": "standard", "temperature": 1, "seed": 0}


@pytest.fixture(scope="module")
def explorer(trained):
    return explored.make_explorer(trained)


@pytest.fixture(scope="module")
def server(explorer):
    with explored.serving(explorer) as server:
        yield server


def assert_refused(answer, status, mentioned=""):
    """The status, and that the answer is a JSON error with the page's headers."""
    found, headers, body = answer
    assert found == status, body
    assert mentioned in json.loads(body)["error"]
    assert headers["Cache-Control"] == "no-store"


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_text_as_code(server):
    folder = resources.files("facevae_jax.exploring") / "page"
    types = {"": "text/html", "style.css": "text/css", "script.js": "javascript", "icon.svg": "image/svg+xml"}
    types["address.js"] = "javascript"
    for name, content_type in types.items():
        status, headers, body = ask(server, "GET", f"/{name}")
        assert (status, body) == (200, (folder / (name or "index.html")).read_bytes())
        assert content_type in headers["Content-Type"]
        assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


def test_a_picture_is_the_decoded_path_between_faces_plus_the_sliders(server, trained):
    a, b = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    step = (np.eye(8)[3] * np.sqrt(trained.moments.covariance[3, 3])).astype(np.float32)
    for request, latent in [
        ({"faces": [to_text(a)]}, a),
        ({"faces": [to_text(a), to_text(b)], "weight": 1.0}, b),
        ({"faces": [to_text(a), to_text(b)], "weight": 0.3}, lerp(a, b, [0.3])[0]),
        ({"faces": [to_text(a)], "alphas": {MOVED: -2.5}}, a - 2.5 * step),
    ]:
        np.testing.assert_array_equal(pixels(post(server, "/render", request)), trained.decode(latent[None])[0])


@pytest.mark.parametrize("prior", ["gaussian", "standard"])
def test_a_new_face_is_that_of_the_command_with_the_same_seed(server, trained, prior):
    face = post(server, "/sample", {"prior": prior, "temperature": 0.7, "seed": 12})
    expected = trained.sample_codes(1, prior=prior, temperature=0.7, seed=12)
    np.testing.assert_array_equal(to_latent(face["latent"]), expected[0])
    np.testing.assert_array_equal(pixels(base64.b64decode(face["picture"])), trained.decode(expected)[0])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_photograph_becomes_its_posterior_mean_and_is_not_stored(server, trained, format):
    data = explored.photograph(size=(600, 800), format=format)  # 1.4 MB as PNG: many chunks
    written, watching = [], threading.Event()
    post(server, "/encode", explored.photograph())  # compiles, which a slow machine keeps in JAX's cache

    def watch(event, arguments):
        if event == "open" and watching.is_set() and isinstance(arguments[2], int) and arguments[2] & 3:
            written.append(arguments[0])

    sys.addaudithook(watch)  # sees every file that is opened; it cannot be removed, hence the switch
    watching.set()
    face = post(server, "/encode", data)
    watching.clear()
    assert not written
    image = read_photograph(data, resolution=32)
    np.testing.assert_array_equal(to_latent(face["latent"]), trained.encode(image[None]).mean[0])
    np.testing.assert_array_equal(pixels(base64.b64decode(face["picture"])), image)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as the command does
def test_what_is_not_a_photograph_is_refused(server, monkeypatch):
    for body in (b"not an image", b"", explored.photograph()[:-200], explored.photograph(format="GIF")):
        assert_refused(ask(server, "POST", "/encode", body), 400)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_000)
    assert_refused(ask(server, "POST", "/encode", explored.photograph()), 400, "bomb")


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server):
    for path, limit in (("/render", MAX_JSON_BYTES), ("/encode", MAX_PHOTOGRAPH_BYTES)):
        assert ask(server, "POST", path, headers={"Content-Length": str(limit + 1)})[0] == 413  # no body is sent
        assert_refused(ask(server, "POST", path, iter([bytes(limit + 1)])), 413)  # chunked: no length is given
        assert_refused(ask(server, "POST", path, iter([bytes(limit)])), 400)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "faces.example:{port}"}, 400),  # a foreign name that resolves to this machine
        ({"Origin": "http://127.0.0.1:1"}, 403),  # another server on this machine
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Host": "localhost:{port}", "Origin": "http://localhost:{port}"}, 200),
    ],
)
def test_requests_from_other_sites_are_refused(server, headers, status):
    headers = {name: value.format(port=server[1]) for name, value in headers.items()}
    assert ask(server, "POST", "/render", json.dumps(GOOD), headers)[0] == status
    if "Origin" not in headers:
        assert ask(server, "GET", "/page.json", headers=headers)[0] == status


def test_other_paths_and_methods_are_refused(server):
    for path in ("/nothing", "/../server.py", "/%2e%2e/server.py", "/render"):
        assert_refused(ask(server, "GET", path), 404)
    assert_refused(ask(server, "PUT", "/render", "{}"), 405)


@pytest.mark.parametrize(
    ("request_", "mentioned"),
    [
        *((body, "JSON") for body in (b"{", b"[" * 100_000, b"\xff", b"[]")),
        *(({"faces": faces}, "faces") for faces in (None, [], [ZERO] * 3)),
        *(({"faces": [face]}, "base64") for face in (5, "é", "AAA=")),
        *(({"faces": [to_text(latent)]}, "8 finite") for latent in (np.zeros(7), np.full(8, np.nan))),
        ({"faces": [ZERO] * 2}, "weight=None"),
        ({"faces": [ZERO] * 2, "weight": 1.01}, "weight=1.01"),
        ({"faces": [ZERO], "alphas": [1]}, "alphas"),
        ({"faces": [ZERO], "alphas": {"dimension:2": 1}}, "dimension:2"),
        *(({"faces": [ZERO], "alphas": {MOVED: alpha}}, MOVED) for alpha in (3.1, float("nan"), 10**400, True)),
        *((DRAW | {"prior": prior}, "prior=") for prior in ("mixture", ["standard"], None)),
        *((DRAW | {"seed": seed}, "seed=") for seed in (2**32, -1, 0.5)),
        (DRAW | {"temperature": -0.1}, "temperature=-0.1"),
    ],
)
def test_invalid_requests_name_the_key(server, request_, mentioned):
    body = request_ if isinstance(request_, bytes) else json.dumps(request_).encode()
    assert_refused(ask(server, "POST", "/sample" if b"seed" in body else "/render", body), 400, mentioned)


def test_a_bug_prints_its_traceback_and_the_server_keeps_serving(server, explorer, monkeypatch, capfd):
    monkeypatch.setattr(explorer, "render", lambda request: 1 // 0)
    assert_refused(ask(server, "POST", "/render", "{}"), 500, "terminal")
    assert capfd.readouterr().err.count("ZeroDivisionError") == 1
    monkeypatch.undo()
    assert post(server, "/render", GOOD)


def test_pages_do_not_affect_each_other(server, trained):
    faces = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        answers = list(executor.map(lambda z: post(server, "/render", {"faces": [to_text(z)]}), faces))
    for latent, answer in zip(faces, answers, strict=True):
        np.testing.assert_array_equal(pixels(answer), trained.decode(latent[None])[0])


def test_an_upload_that_breaks_off_prints_nothing(server, capfd):
    with socket.create_connection(server) as connection:
        connection.sendall(f"POST /encode HTTP/1.1\r\nHost: {server[0]}\r\nContent-Length: 9\r\n\r\nxx".encode())
        assert post(server, "/render", GOOD)  # others do not wait
    assert post(server, "/render", GOOD)
    assert capfd.readouterr().err == ""


def test_it_listens_on_the_loopback_address_only(server):
    with pytest.raises(ConnectionRefusedError):  # another loopback address, which 0.0.0.0 would include
        socket.create_connection(("127.0.0.2", server[1]), timeout=120)
    with pytest.raises(UserError, match=f"port={server[1]}"):
        listen(server[1])


def test_sliders_are_the_dimensions_that_change_the_picture_most(trained):
    mean, deviations = trained.moments.mean, np.sqrt(np.diag(trained.moments.covariance))
    base = trained.decode(mean[None]).astype(float)
    changes = [np.square(trained.decode(row[None]) - base).mean() for row in mean + np.diag(deviations)]
    assert sheets.strongest_dimensions(trained) == np.argsort(-np.array(changes), kind="stable").tolist()
    with pytest.raises(UserError, match=r"dimensions=8.*0 to 7"):
        sliders.dimension_sliders(trained, [8])


def test_sliders_of_attributes(trained):
    made, lines = sliders.attribute_sliders(trained, ["glasses", "hair_length"])
    assert [slider.label for slider in made] == ["Glasses", "Hair length"]
    assert len(lines) == 2
    assert all(np.linalg.norm(slider.step) > 0 for slider in made)
    with pytest.raises(UserError, match=r"glases.*glasses"):
        sliders.attribute_sliders(trained, ["glases"])


def test_attributes_come_best_first_and_weak_ones_are_marked(trained, monkeypatch):
    scores = {"shirt": 0.9, "glasses": 0.21, "smile": 0.19, "turn": -0.1}
    monkeypatch.setattr(sliders, "attribute_scores", lambda trained: scores)
    made, _ = sliders.attribute_sliders(trained)
    assert [slider.label for slider in made] == ["Shirt", "Glasses", "Smile", "Turn"]
    assert [slider.score for slider in made] == list(scores.values())
    assert [slider.weak for slider in made] == [False, False, True, True]
    (named,), _ = sliders.attribute_sliders(trained, ["smile"])
    assert (named.score, named.weak) == (0.19, False)  # whoever names an attribute wants to see it


def test_as_many_attributes_are_shown_as_fit(trained):
    made, _ = sliders.attribute_sliders(trained)
    assert [slider.key for slider in made] == [f"attribute:{name}" for name in attribute_scores(trained)][
        : sliders.SHOWN
    ]


def test_without_the_data_there_are_no_attributes_unless_named(trained, monkeypatch):
    def missing(dataset):
        raise UserError("config.data.name='celeba' is not prepared.")

    monkeypatch.setattr(Drawn, "attributes", property(missing))
    made, (line,) = sliders.attribute_sliders(trained)
    assert not made
    assert "config.data.name='celeba'" in line
    with pytest.raises(UserError, match="not prepared"):
        sliders.attribute_sliders(trained, ["Smiling"])


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")  # without the priors that other tests fit
    command = [sys.executable, "-m", "facevae_jax.explore", f"--workdir={workdir}", "--attribute=glasses"]
    environment = os.environ | {"XLA_FLAGS": CHEAP}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            address, printed = None, []
            while not address and (line := process.stdout.readline()):
                printed.append(line)
                address = re.search(r"http://(127\.0\.0\.1):(\d+)/", line)
            assert address, process.stderr.read()
            assert printed[0].startswith("glasses")
            server = (address[1], int(address[2]))
            page = json.loads(ask(server, "GET", "/page.json")[2])
            assert [page[key] for key in ("name", "step", "resolution", "code_size")] == ["run", 20, 32, 8]
            assert [slider["kind"] for slider in page["sliders"]] == ["attribute", *["dimension"] * 8]
            assert [prior["name"] for prior in page["priors"]] == ["gaussian", "standard"]
            with socket.create_connection(server) as upload:  # half a request
                upload.sendall(f"POST /encode HTTP/1.1\r\nHost: {server[0]}\r\nContent-Length: 9\r\n\r\nxx".encode())
                process.send_signal(signal.SIGINT)
                rest, errors = process.communicate(timeout=120)
        finally:
            process.kill()  # or a failed assertion would wait for it forever
    assert (process.returncode, rest.strip(), errors.splitlines()) == (130, "", ["stopped."])
