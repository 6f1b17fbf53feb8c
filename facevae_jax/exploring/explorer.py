"""What a page asks of a model: pictures of edited faces, new faces, and faces of photographs.

Nothing is remembered between two calls: the page holds its own latents and sends them along, so that two pages do not
disturb each other, none expires, and a photograph is gone once it is answered.
"""

import base64
import binascii
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from facevae_jax.data.images import encode_png
from facevae_jax.errors import UserError
from facevae_jax.exploring.sliders import MAX_ALPHA, Slider
from facevae_jax.generation.photographs import read_photograph
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents.arithmetic import lerp
from facevae_jax.latents.priors import Prior, PriorName, drawer
from facevae_jax.random import named_key

MAX_PHOTOGRAPH_BYTES = 10 * 2**20
MAX_TEMPERATURE = 2.0  # of the page's slider
PRIOR_LABELS: dict[str, str] = {
    "gaussian": "Gaussian, fitted to the faces",
    "standard": "N(0, I)",
    "mixture": "Mixture of Gaussians",
    "second_stage": "Second-stage VAE",
}


class Scene(NamedTuple):
    """One picture: a way between two faces, or one face, and how far the sliders are."""

    faces: Float32[np.ndarray, "k z"]
    weight: float  # 0 the first face, 1 the second
    alphas: Mapping[str, float]  # by the sliders' keys


class Explorer:
    """A model with its sliders and priors; compiled, and safe to be called by several threads."""

    def __init__(
        self, trained: TrainedVAE, *, sliders: Sequence[Slider], priors: Sequence[PriorName], name: str = ""
    ) -> None:
        """Compiles what is asked for most, so that no first slider waits.

        Args:
          trained: the model.
          sliders: in the page's order.
          priors: to draw new faces from, the page's first choice first; they are fitted where that was not done before.
          name: what the page calls the model.

        Raises:
          UserError: a prior cannot be fitted.
        """
        self._trained = trained
        self._name = name
        self._sliders = {slider.key: slider for slider in sliders}
        self._priors: dict[str, Prior] = {prior: trained.prior(prior) for prior in priors}
        self._computing = threading.Lock()  # one computation takes all cores: two at once would both be late
        self._reading = threading.Lock()  # a large photograph takes half a gigabyte: not several at once
        side = trained.resolution
        trained.encode(np.zeros((1, side, side, 3), np.uint8))
        for prior in self._priors:
            self.sample({"prior": prior, "temperature": 1.0, "seed": 0})

    def describe(self) -> dict[str, Any]:
        """What the page is built from."""
        trained = self._trained
        return {
            "name": self._name,
            "step": trained.step,
            "resolution": trained.resolution,
            "latent_dim": trained.latent_dim,
            "max_photograph_bytes": MAX_PHOTOGRAPH_BYTES,
            "max_alpha": MAX_ALPHA,
            "max_temperature": MAX_TEMPERATURE,
            "sliders": [{"key": s.key, "kind": s.kind, "label": s.label} for s in self._sliders.values()],
            "priors": [{"name": name, "label": PRIOR_LABELS.get(name, name)} for name in self._priors],
        }

    def render(self, request: Mapping[str, Any]) -> bytes:
        """The PNG of a scene.

        Raises:
          UserError: the request is not what a page sends.
        """
        scene = self.read_scene(request)
        latent = scene.faces[0]
        if len(scene.faces) == 2:
            (latent,) = lerp(scene.faces[0], scene.faces[1], [scene.weight])
        for key, alpha in scene.alphas.items():
            latent = latent + np.float32(alpha) * self._sliders[key].step
        return encode_png(self._decode(latent))

    def sample(self, request: Mapping[str, Any]) -> dict[str, str]:
        """A new face and its picture: the first of `generate sample` with the same seed, prior and temperature.

        Raises:
          UserError: the request is not what a page sends.
        """
        name, seed = request.get("prior"), request.get("seed")
        if not isinstance(name, str) or name not in self._priors:
            raise UserError(f"prior={name!r:.40} is not one of {', '.join(self._priors)}.")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise UserError(f"seed={seed!r:.40} must be a whole number from 0 to 2**32 - 1.")
        temperature = number(request, "temperature", 0.0, MAX_TEMPERATURE)
        with self._computing:
            drawn = drawer(self._priors[name], temperature=temperature)(named_key(seed, "sample"), np.arange(1))
        (latent,) = np.asarray(drawn)
        return _face(latent, self._decode(latent))

    def encode(self, photograph: bytes) -> dict[str, str]:
        """The face of a photograph, which is its posterior's mean, and the part of the photograph that was seen.

        Raises:
          UserError: it is no photograph, or damaged.
        """
        with self._reading:
            image = read_photograph(photograph, resolution=self._trained.resolution)
        with self._computing:
            (latent,) = self._trained.encode(image[None]).mean
        return _face(latent, image)

    def wait(self, seconds: float) -> None:
        """Waits for a running computation: a process that ends in the middle of one may crash."""
        self._computing.acquire(timeout=seconds)

    def read_scene(self, request: Mapping[str, Any]) -> Scene:
        """The scene that a page asks for.

        Raises:
          UserError: it is impossible.
        """
        faces, alphas = request.get("faces"), request.get("alphas", {})
        if not isinstance(faces, list) or len(faces) not in (1, 2):
            raise UserError("faces must be a list of one or two latents.")
        if not isinstance(alphas, dict):
            raise UserError("alphas must be numbers by the names of sliders.")
        if unknown := sorted(set(alphas) - set(self._sliders)):
            raise UserError(f"{unknown[0]!r:.40} is no slider of this model: load the page again.")
        weight = number(request, "weight", 0.0, 1.0) if len(faces) == 2 else 0.0
        moved = {key: number(alphas, key, -MAX_ALPHA, MAX_ALPHA) for key in alphas}
        return Scene(np.stack([self._read_latent(face) for face in faces]), weight, moved)

    def _read_latent(self, text: Any) -> Float32[np.ndarray, " z"]:
        try:
            latent = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
        except (TypeError, ValueError, binascii.Error) as error:
            raise UserError("a latent must be float32 numbers in base64.") from error
        if latent.size != self._trained.latent_dim or not np.isfinite(latent).all():
            raise UserError(f"a latent of this model is {self._trained.latent_dim} numbers: load the page again.")
        return latent.astype(np.float32)

    def _decode(self, latent: Float32[np.ndarray, " z"]) -> UInt8[np.ndarray, "r r 3"]:
        with self._computing:
            return self._trained.decode(latent[None])[0]


def read_json(body: bytes) -> Mapping[str, Any]:
    """The object that a request's body holds.

    Raises:
      UserError: it holds none.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError("the request is not JSON.") from error
    if not isinstance(request, dict):
        raise UserError("the request is no JSON object.")
    return request


def number(request: Mapping[str, Any], key: str, low: float, high: float) -> float:
    """A number of a request.

    Raises:
      UserError: it is none, or out of range.
    """
    value: Any = request.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN, which is JSON to Python, is in no range
        raise UserError(f"{key}={value!r:.40} must be a number from {low:g} to {high:g}.")
    return float(value)


def _face(latent: Float32[np.ndarray, " z"], picture: UInt8[np.ndarray, "r r 3"]) -> dict[str, str]:
    return {
        "latent": base64.b64encode(latent.astype("<f4").tobytes()).decode(),
        "picture": base64.b64encode(encode_png(picture)).decode(),
    }
