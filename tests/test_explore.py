"""The page to explore a model with: its calls over HTTP, what it refuses, and the command."""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from facevae_jax.errors import UserError
from facevae_jax.exploring import sliders
from facevae_jax.exploring.explorer import MAX_PHOTOGRAPH_BYTES
from facevae_jax.exploring.server import PageServer, read_files
from facevae_jax.files import write_json
from facevae_jax.generation import sheets
from facevae_jax.generation.photographs import read_photograph
from facevae_jax.latents.arithmetic import lerp
from facevae_jax.training.checkpoints import Checkpoints
from tests.conftest import REPOSITORY, assert_one_line_error, run_module
from tests.explored import (
    ask,
    make_explorer,
    photograph,
    pixels,
    post,
    random_model,
    random_state,
    serving,
    to_latent,
    to_text,
    words,
)

MOVED = "dimension:3"


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    return random_model(tiny_config, tmp_path_factory.mktemp("explored"))


@pytest.fixture(scope="module")
def explorer(trained):
    return make_explorer(trained)


@pytest.fixture(scope="module")
def server(explorer):
    with serving(explorer) as server:
        yield server


def raw(server, text, rest=b""):
    """What is answered to bytes that no client library would send."""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        received = []
        with contextlib.suppress(ConnectionError):  # refused bytes are not all taken; the answer is there all the same
            connection.sendall(text.replace("\n", "\r\n").encode() + rest)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            received.extend(iter(lambda: connection.recv(65536), b""))
        return b"".join(received).decode(errors="replace")


def latents(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_text_as_code(server):
    for path, (content, content_type) in read_files().items():
        response, body = ask(server, "GET", path)
        assert (response.status, body, response.headers["Content-Type"]) == (200, content, content_type)
        assert response.headers["Cache-Control"] == "no-store"
        policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w|@import|\beval\b|innerHTML| on\w+=|<style|\sstyle=", text), path


def test_the_page_is_told_what_it_is_built_from(server):
    page = json.loads(ask(server, "GET", "/page.json")[1])
    assert (page["name"], page["step"], page["resolution"], page["latent_dim"]) == ("tiny", 7, 32, 8)
    assert [slider["key"] for slider in page["sliders"]] == ["dimension:3", "dimension:1"]
    assert [prior["name"] for prior in page["priors"]] == ["gaussian", "standard"]
    assert page["max_photograph_bytes"] == MAX_PHOTOGRAPH_BYTES == 10 * 2**20


def test_a_scene_is_the_decoded_way_between_faces_plus_the_sliders(server, trained):
    a, b = latents(2)
    step = np.eye(8, dtype=np.float32)[3]  # the covariance of a new model's latents is I
    for request, latent in [
        ({"faces": [to_text(a)]}, a),
        ({"faces": [to_text(a), to_text(b)], "weight": 0}, a),
        ({"faces": [to_text(a), to_text(b)], "weight": 1.0}, b),
        ({"faces": [to_text(a), to_text(b)], "weight": 0.3}, lerp(a, b, [0.3])[0]),
        ({"faces": [to_text(a)], "alphas": {MOVED: -2.5}}, a - 2.5 * step),
        ({"faces": [to_text(a)], "alphas": {MOVED: 1, "dimension:1": 0}}, a + step),
    ]:
        np.testing.assert_array_equal(pixels(post(server, "/render", request)), trained.decode(latent[None])[0])


@pytest.mark.parametrize("prior", ["gaussian", "standard"])
def test_a_new_face_is_that_of_the_command_with_the_same_seed(server, trained, prior):
    face = post(server, "/sample", {"prior": prior, "temperature": 0.7, "seed": 12})
    expected = trained.sample_latents(1, prior=prior, temperature=0.7, seed=12)
    np.testing.assert_allclose(to_latent(face["latent"]), expected[0], rtol=1e-5, atol=1e-6)
    picture = pixels(base64.b64decode(face["picture"])).astype(int)
    assert np.abs(picture - trained.decode(expected)[0]).max() <= 1
    still = post(server, "/sample", {"prior": prior, "temperature": 0, "seed": 12})
    np.testing.assert_array_equal(to_latent(still["latent"]), np.zeros(8))


_written: list[str] = []
_watching = threading.Event()


def _watch(event, arguments):
    if event == "open" and _watching.is_set() and isinstance(arguments[2], int) and arguments[2] & 3:
        _written.append(str(arguments[0]))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_photograph_becomes_its_posteriors_mean_and_is_not_stored(server, trained, format):
    data = photograph(format=format)
    sys.addaudithook(_watch)  # sees every opening of a file; it cannot be removed, hence the switch
    _watching.set()
    face = post(server, "/encode", data)
    _watching.clear()
    assert not _written
    image = read_photograph(data, resolution=32)
    np.testing.assert_array_equal(to_latent(face["latent"]), trained.encode(image[None]).mean[0])
    np.testing.assert_array_equal(pixels(base64.b64decode(face["picture"])), image)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as the command does
def test_what_is_no_photograph_is_told_in_words(server):
    assert "cannot identify" in words(ask(server, "POST", "/encode", b"not an image"), 400)
    assert "cannot be read" in words(ask(server, "POST", "/encode", b""), 400)
    assert "cannot be read" in words(ask(server, "POST", "/encode", photograph()[:-200]), 400)
    file = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(file, format="PNG")  # 11 kB that would be 270 MB
    assert "bomb" in words(ask(server, "POST", "/encode", file.getvalue()), 400)
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, format="GIF")  # of a decoder that is not let near what comes from outside
    assert "cannot identify" in words(ask(server, "POST", "/encode", file.getvalue()), 400)


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server):
    head = "POST /encode HTTP/1.1\nHost: {}\nContent-Length: {}\n"
    host = f"127.0.0.1:{server.server_address[1]}"
    answer = raw(server, head.format(host, 20 * 2**20) + "\n", bytes(20 * 2**20))
    assert answer.startswith("HTTP/1.1 413")
    assert "20.0 MB are too much: 10 MB are the most." in answer
    answer = raw(server, head.format(host, 10**12) + "Expect: 100-continue\n\n")
    assert answer.startswith("HTTP/1.1 413")  # and no `100 Continue` before it
    assert "413" in raw(server, head.format(host, 2**20 + 1).replace("/encode", "/render") + "\n")
    assert "413" not in raw(server, head.format(host, MAX_PHOTOGRAPH_BYTES) + "\n", b"x")  # a length that is allowed
    data = photograph()
    answer = raw(server, head.format(host, len(data)) + "Expect: 100-continue\n\n", data)
    assert answer.startswith("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Host: {host}\nTransfer-Encoding: chunked", 411),
        ("Host: {host}", 411),
        ("Host: {host}\nContent-Length: -1", 400),
        ("Host: {host}\nContent-Length: 1_0", 400),
        ("Host: {host}\nContent-Length: 2\nContent-Length: 3", 400),
        ("Host: faces.example:{port}\nContent-Length: 2", 421),  # a name that was made to lead here
        ("Host: 127.0.0.1\nContent-Length: 2", 421),
        ("Host: {host}\nHost: {host}\nContent-Length: 2", 421),
        ("Content-Length: 2", 421),
        ("Host: {host}\nContent-Length: 2\nOrigin: http://faces.example", 403),
        ("Host: {host}\nContent-Length: 2\nOrigin: null", 403),
        ("Host: {host}\nContent-Length: 2\nOrigin: http://{host}", 400),  # let through: {} is no scene
        ("Host: LOCALHOST:{port}\nContent-Length: 2\nOrigin: http://localhost:{port}", 400),
    ],
)
def test_requests_from_elsewhere_or_without_a_length_are_refused(server, headers, status):
    port = server.server_address[1]
    head = headers.format(host=f"127.0.0.1:{port}", port=port)
    assert raw(server, f"POST /render HTTP/1.1\n{head}\n\n", b"{}").startswith(f"HTTP/1.1 {status} ")
    if status in (403, 421):
        assert raw(server, f"GET /page.json HTTP/1.1\n{head}\n\n").startswith(f"HTTP/1.1 {status} ")


def test_other_paths_and_methods_are_refused(server):
    for path in ("/nothing", "/../server.py", "/page/index.html", "/render"):
        assert words(ask(server, "GET", path), 404)
    assert words(ask(server, "POST", "/", "{}"), 404)
    response, body = ask(server, "PUT", "/render", "{}")
    assert response.status == 501
    assert b"<" not in body


GOOD = {"faces": [to_text(np.zeros(8))], "alphas": {MOVED: 1.0}}


@pytest.mark.parametrize(
    ("path", "request_", "mentioned"),
    [
        ("/render", b"{", "JSON"),
        ("/render", b"[" * 100_000, "JSON"),
        ("/render", b"\xff", "JSON"),
        ("/render", [], "object"),
        ("/render", {}, "faces"),
        ("/render", GOOD | {"faces": []}, "faces"),
        ("/render", GOOD | {"faces": GOOD["faces"] * 3}, "faces"),
        ("/render", GOOD | {"faces": [5]}, "base64"),
        ("/render", GOOD | {"faces": ["é"]}, "base64"),
        ("/render", GOOD | {"faces": ["AAA="]}, "base64"),
        ("/render", GOOD | {"faces": [to_text(np.zeros(7))]}, "8 numbers"),
        ("/render", GOOD | {"faces": [to_text(np.full(8, np.nan))]}, "8 numbers"),
        ("/render", GOOD | {"faces": GOOD["faces"] * 2}, "weight=None"),
        ("/render", GOOD | {"faces": GOOD["faces"] * 2, "weight": 1.01}, "weight=1.01"),
        ("/render", GOOD | {"alphas": {"dimension:2": 1}}, "dimension:2"),
        ("/render", GOOD | {"alphas": {MOVED: 3.1}}, "3.1"),
        ("/render", GOOD | {"alphas": {MOVED: float("nan")}}, "nan"),
        ("/render", GOOD | {"alphas": {MOVED: 10**400}}, "from -3 to 3"),
        ("/render", GOOD | {"alphas": {MOVED: True}}, "True"),
        ("/render", GOOD | {"alphas": [1]}, "alphas"),
        ("/sample", {"prior": "mixture", "temperature": 1, "seed": 0}, "mixture"),
        ("/sample", {"prior": ["standard"], "temperature": 1, "seed": 0}, "prior"),
        ("/sample", {"prior": "standard", "temperature": -0.1, "seed": 0}, "temperature"),
        ("/sample", {"prior": "standard", "temperature": 1, "seed": 2**32}, "seed"),
        ("/sample", {"prior": "standard", "temperature": 1, "seed": 0.5}, "seed"),
    ],
)
def test_impossible_requests_are_told_in_words(server, path, request_, mentioned):
    body = request_ if isinstance(request_, bytes) else json.dumps(request_)
    assert mentioned in words(ask(server, "POST", path, body), 400)


def test_a_fault_of_ours_is_told_in_the_terminal_and_the_server_goes_on(server, explorer, monkeypatch, capsys):
    monkeypatch.setattr(explorer, "render", lambda request: 1 // 0)
    assert "terminal" in words(ask(server, "POST", "/render", "{}"), 500)
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.undo()
    assert post(server, "/render", GOOD)


def test_pages_do_not_disturb_each_other(server, trained):
    faces = latents(16, seed=1)
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        answers = list(executor.map(lambda z: post(server, "/render", {"faces": [to_text(z)]}), faces))
    for latent, answer in zip(faces, answers, strict=True):
        np.testing.assert_array_equal(pixels(answer), trained.decode(latent[None])[0])


def test_connections_that_break_off_or_stay_silent_hinder_nobody(server, capsys):
    silent = [socket.create_connection(server.server_address) for _ in range(4)]
    silent[1].sendall(b"POST /enc")
    host = f"Host: 127.0.0.1:{server.server_address[1]}"
    silent[2].sendall(f"POST /encode HTTP/1.1\r\n{host}\r\nContent-Length: 100\r\n\r\nxx".encode())
    assert post(server, "/render", GOOD)
    for connection in silent:
        connection.close()
    assert post(server, "/render", GOOD)
    assert capsys.readouterr().err == ""


def test_one_connection_serves_many_requests(server):
    connection = http.client.HTTPConnection(*server.server_address, timeout=30)
    for _ in range(3):
        connection.request("POST", "/render", json.dumps(GOOD))
        assert connection.getresponse().read().startswith(b"\x89PNG")
    local = connection.sock.getsockname()
    connection.request("GET", "/")
    assert connection.getresponse().read().startswith(b"<!doctype html>")
    assert connection.sock.getsockname() == local
    connection.close()


def test_it_listens_on_this_machines_loopback_address_alone(server):
    assert server.address == f"http://127.0.0.1:{server.server_address[1]}/"
    with pytest.raises(ConnectionRefusedError):  # another of the loopback's addresses, which 0.0.0.0 would include
        socket.create_connection(("127.0.0.2", server.server_address[1]), timeout=5)
    with pytest.raises(UserError, match=r"--port=\d+ is taken"):
        PageServer(server.server_address[1])


def test_sliders_are_of_the_dimensions_that_change_the_picture_most(trained):
    base = trained.decode(trained.mean_latent[None]).astype(float)
    changes = [np.square(trained.decode(row[None]) - base).mean() for row in np.eye(8, dtype=np.float32)]
    assert sheets.strongest_dimensions(trained) == np.argsort(-np.array(changes), kind="stable").tolist()
    with pytest.raises(UserError, match=r"--dimensions=8.*0 to 7"):
        sliders.dimension_sliders(trained, [8])


def test_sliders_of_attributes(trained):
    made, lines = sliders.attribute_sliders(trained, ["glasses", "hair_length"])
    assert [(slider.key, slider.label) for slider in made] == [
        ("attribute:glasses", "Glasses"),
        ("attribute:hair_length", "Hair length"),
    ]
    assert len(lines) == 2
    assert all(np.linalg.norm(slider.step) > 0 for slider in made)
    with pytest.raises(UserError, match=r"glases.*glasses"):
        sliders.attribute_sliders(trained, ["glases"])
    assert sliders.default_attributes(trained)[:3] == ["smile", "glasses", "hair_length"]
    assert len(sliders.default_attributes(trained)) == sliders.SHOWN


def test_without_the_data_there_are_no_attributes_unless_they_are_asked_for(trained, monkeypatch):
    def missing(trained):
        raise UserError("config.data.name='celeba' is not prepared.")

    monkeypatch.setattr(sliders.latent_tables, "attributes_of", missing)
    assert sliders.attribute_sliders(trained) == (
        [],
        ["note: no attribute has a slider: config.data.name='celeba' is not prepared."],
    )
    with pytest.raises(UserError, match="not prepared"):
        sliders.attribute_sliders(trained, ["Smiling"])


@pytest.fixture(scope="module")
def workdir(tiny_config, tmp_path_factory):
    """A run that holds a checkpoint."""
    workdir = tmp_path_factory.mktemp("explore") / "run"
    workdir.mkdir()
    write_json(workdir / "config.json", tiny_config.to_dict())
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(random_state(tiny_config), step=3, loss=1.0)
    return workdir


def test_the_command_serves_until_ctrl_c(workdir):
    command = [sys.executable, "-m", "facevae_jax.explore", f"--workdir={workdir}", "--attribute=glasses"]
    environment = os.environ | {"XLA_FLAGS": ""}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            address, said = None, []
            for line in process.stdout:
                said.append(line)
                if address := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
                    break
            assert address, process.stderr.read()
            assert said[0].startswith("glasses by mean")
            connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=30)
            connection.request("GET", "/page.json")
            page = json.loads(connection.getresponse().read())
            assert [slider["kind"] for slider in page["sliders"]] == ["attribute", *["dimension"] * 8]
            assert [prior["name"] for prior in page["priors"]] == ["standard"]  # of a run that was never evaluated
            process.send_signal(signal.SIGINT)  # while a connection is open
            rest, errors = process.communicate(timeout=30)
        finally:
            process.kill()  # a failed assertion would wait for it for ever
    assert (process.returncode, rest.strip(), errors) == (0, "ended.", "")


def test_mistakes_are_told_in_one_line(workdir, tmp_path):
    def run(*flags):
        return run_module("facevae_jax.explore", *flags)

    assert_one_line_error(run(), "--workdir is missing")
    assert_one_line_error(run(f"--workdir={workdir}", "--prior=gausian"), "--prior='gausian'", "gaussian")
    assert_one_line_error(run(f"--workdir={workdir}", "--dimensions=0,x"), "--dimensions='0,x'")
    assert_one_line_error(run(f"--workdir={workdir}", "--port=65536"), "port", "65536")
    assert_one_line_error(run(f"--workdir={workdir}", "--attribute=glases"), "glases", "glasses")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line_error(run(f"--workdir={workdir}", f"--port={port}"), f"--port={port} is taken")
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    assert_one_line_error(run(f"--workdir={tmp_path}"), "no checkpoint")
