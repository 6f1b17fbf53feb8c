"""A random model behind the page's server, for tests of the server and of the page."""

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
from facevae_jax.exploring.server import PageServer
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.training.restore import RestoredModel
from facevae_jax.training.sharding import make_mesh
from facevae_jax.training.state import create_state, make_model, make_optimizer


def random_state(config):
    """A model before its first step: nothing here depends on what was learnt."""
    return create_state(config, make_model(config), make_optimizer(config.train, total_steps=1), make_mesh())


def random_model(config, folder):
    """That model as the page's commands see it, after an evaluation."""
    state = random_state(config)
    moments = state.latent_moments.replace(images=np.float32(37))
    restored = RestoredModel(
        config, make_model(config), state.evaluation_variables, moments, state.decoder_variance, step=7
    )
    return TrainedVAE(restored, folder=folder)


@contextlib.contextmanager
def serving(explorer):
    """The page's server in a thread."""
    with PageServer(0) as server:
        thread = threading.Thread(target=server.serve, args=[explorer], daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)


def make_explorer(trained):
    """A page with two sliders, of the dimensions 3 and 1."""
    steps = sliders.dimension_sliders(trained, [3, 1])
    return Explorer(trained, sliders=steps, priors=["gaussian", "standard"], name="tiny")


def ask(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(*server.server_address, timeout=30)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def post(server, path, value):
    response, body = ask(server, "POST", path, value if isinstance(value, bytes) else json.dumps(value))
    assert response.status == 200, body
    return body if response.headers["Content-Type"] == "image/png" else json.loads(body)


def words(answer, status):
    """The error's text; its status is checked."""
    response, body = answer
    assert response.status == status, body
    return json.loads(body)["error"]


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
