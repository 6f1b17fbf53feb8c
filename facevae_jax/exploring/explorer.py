"""What the page asks of a model: pictures of edited faces, new faces, and the faces in photographs.

The server keeps no state. Each page holds its latents and sends them with every request, so pages do not affect each
other, none expires, and a photograph is gone once it is answered.
"""

import base64
import binascii
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from facevae_jax.core.errors import UserError
from facevae_jax.data.sources.images import encode_png
from facevae_jax.data.sources.photographs import read_photograph
from facevae_jax.exploring.sliders import MAX_ALPHA, Slider
from facevae_jax.latents.paths import lerp
from facevae_jax.latents.priors import prior_class
from facevae_jax.latents.priors.base import Prior
from facevae_jax.trained import familiarity
from facevae_jax.trained.model import TrainedModel

MAX_PHOTOGRAPH_BYTES = 10 * 2**20
MAX_TEMPERATURE = 2.0  # end of the page's slider


class Explorer:
    """A compiled model with its sliders and priors; methods may be called from several threads."""

    def __init__(
        self, trained: TrainedModel, *, sliders: Sequence[Slider], priors: Sequence[str], name: str = ""
    ) -> None:
        """Compiles encoding, sampling and decoding, so that the first slider move does not wait.

        Args:
          trained: the model.
          sliders: in the page's order.
          priors: to draw new faces from, the page's default first; fitted here if they are not yet.
          name: the model's name on the page.

        Raises:
          UserError: a prior cannot be fitted.
        """
        self._trained = trained
        self._name = name
        self._sliders = {slider.key: slider for slider in sliders}
        self._priors: dict[str, Prior] = {prior: trained.prior(prior) for prior in priors}
        self._computing = threading.Lock()  # one computation uses all cores: two at once would both be late
        familiarity.familiar_error(trained)  # kept now: while a photograph is answered, nothing is written
        self._reading = threading.Lock()  # decoding a large photograph takes half a gigabyte: one at a time
        side = trained.resolution
        trained.encode(np.zeros((1, side, side, 3), np.uint8))
        for prior in self._priors:
            self.sample({"prior": prior, "temperature": 1.0, "seed": 0})

    def describe(self) -> dict[str, Any]:
        """What the page is built from, as JSON values."""
        trained = self._trained
        return {
            "name": self._name,
            "step": trained.step,
            "resolution": trained.resolution,
            "code_size": trained.code_size,
            "max_photograph_bytes": MAX_PHOTOGRAPH_BYTES,
            "max_alpha": MAX_ALPHA,
            "max_temperature": MAX_TEMPERATURE,
            "sliders": [slider.describe() for slider in self._sliders.values()],
            "priors": [{"name": name, "label": prior_class(name).label} for name in self._priors],
        }

    def render(self, request: Mapping[str, Any]) -> bytes:
        """The PNG of a face, or of a morph between two, moved along the sliders.

        Args:
          request: `faces`, one or two latents in base64; `weight`, 0 for the first to 1 for the second, where there are
            two; `alphas`, standard deviations by slider key.

        Raises:
          UserError: the request is invalid.
        """
        faces, alphas = request.get("faces"), request.get("alphas", {})
        if not isinstance(faces, list) or len(faces) not in (1, 2):
            raise UserError("faces must be a list of one or two latents.")
        if not isinstance(alphas, dict):
            raise UserError("alphas must be an object of numbers by slider key.")
        if unknown := sorted(set(alphas) - set(self._sliders)):
            raise UserError(f"{unknown[0]!r:.40} is not a slider of this model: reload the page.")
        latent, *others = map(self._read_latent, faces)
        for other in others:
            (latent,) = lerp(latent, other, [number(request, "weight", 0.0, 1.0)])
        for key in alphas:
            latent = latent + np.float32(number(alphas, key, -MAX_ALPHA, MAX_ALPHA)) * self._sliders[key].step
        return encode_png(self._decode(latent))

    def sample(self, request: Mapping[str, Any]) -> dict[str, str]:
        """A new face and its PNG: the first image of `generate sample` with the same seed, prior and temperature.

        A hierarchy's groups below the code are at the means of their priors, as with `--detail=mean`.

        Raises:
          UserError: the request is invalid.
        """
        name, seed = request.get("prior"), request.get("seed")
        if not isinstance(name, str) or name not in self._priors:
            raise UserError(f"prior={name!r:.40} is not one of {', '.join(self._priors)}.")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise UserError(f"seed={seed!r:.40} must be an integer from 0 to 2**32 - 1.")
        temperature = number(request, "temperature", 0.0, MAX_TEMPERATURE)
        with self._computing:
            (latent,) = self._trained.sample_codes(1, prior=self._priors[name], temperature=temperature, seed=seed)
        return _face(latent, self._decode(latent))

    def encode(self, photograph: bytes) -> dict[str, str]:
        """A photograph's posterior mean, the PNG of the part of the photograph that the model saw, and perhaps a note.

        Raises:
          UserError: it is not an image, or damaged.
        """
        with self._reading:
            image = read_photograph(photograph, resolution=self._trained.resolution)
        with self._computing:
            (latent,) = self._trained.inference.encode(image[None]).mean
            (unlike,) = familiarity.unlike_training(self._trained, image[None])
        return _face(latent, image) | ({"note": familiarity.note(["This photograph"])} if unlike else {})

    def _read_latent(self, text: Any) -> Float32[np.ndarray, " z"]:
        try:
            latent = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
        except (TypeError, ValueError, binascii.Error) as error:
            raise UserError("a latent must be float32 values in base64.") from error
        if latent.size != self._trained.code_size or not np.isfinite(latent).all():
            raise UserError(f"a latent of this model has {self._trained.code_size} finite values: reload the page.")
        return latent.astype(np.float32)

    def _decode(self, latent: Float32[np.ndarray, " z"]) -> UInt8[np.ndarray, "r r 3"]:
        with self._computing:
            return self._trained.decode(latent[None])[0]


def read_json(body: bytes) -> Mapping[str, Any]:
    """The JSON object in a request's body.

    Raises:
      UserError: the body is something else.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError("the request is not JSON.") from error
    if not isinstance(request, dict):
        raise UserError("the request is not a JSON object.")
    return request


def number(request: Mapping[str, Any], key: str, low: float, high: float) -> float:
    """The number at `key`.

    Raises:
      UserError: it is missing, not a number, or out of range.
    """
    value: Any = request.get(key)
    if type(value) not in (int, float) or not low <= value <= high:  # NaN, which Python reads as JSON, is in no range
        raise UserError(f"{key}={value!r:.40} must be a number from {low:g} to {high:g}.")
    return float(value)


def _face(latent: Float32[np.ndarray, " z"], picture: UInt8[np.ndarray, "r r 3"]) -> dict[str, str]:
    return {
        "latent": base64.b64encode(latent.astype("<f4").tobytes()).decode(),
        "picture": base64.b64encode(encode_png(picture)).decode(),
    }
