"""The server of the page that explores a model, for tests of the server and of the page."""

import base64
import contextlib
import http.client
import io
import json
import threading

import numpy as np
from PIL import Image

from facevae_jax.exploring import sliders
from facevae_jax.exploring.explorer import Explorer
from facevae_jax.exploring.server import listen, make_server


@contextlib.contextmanager
def serving(explorer):
    """The page's server in a thread; yields its (host, port)."""
    server, listener = make_server(explorer), listen(0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()


def make_explorer(trained):
    """An explorer with sliders for dimensions 3 and 1, and for two attributes, one of them weak."""
    strong, weak = sliders.attribute_sliders(trained, ["glasses", "smile"])[0]
    steps = [strong, weak._replace(weak=True), *sliders.dimension_sliders(trained, [3, 1])]
    return Explorer(trained, sliders=steps, priors=["gaussian", "standard"], name="tiny")


def ask(server, method, path, body=None, headers=None):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection(*server, timeout=120)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def post(server, path, value):
    """The decoded answer to a request that must succeed."""
    status, headers, body = ask(server, "POST", path, value if isinstance(value, bytes) else json.dumps(value))
    assert status == 200, body
    return body if headers["Content-Type"] == "image/png" else json.loads(body)


def to_text(latent):
    return base64.b64encode(np.asarray(latent, "<f4").tobytes()).decode()


def to_latent(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def photograph(size=(60, 80), seed=0, format="PNG"):
    image = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=format)
    return file.getvalue()
