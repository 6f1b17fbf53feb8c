"""Sheets of faces: reconstructions, samples, interpolation, morphing, traversal and edits."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from facevae_jax.core import pictures
from facevae_jax.core.errors import UserError
from facevae_jax.generation import sheets
from facevae_jax.generation.sheets import ALPHAS, decode_rows
from facevae_jax.inference import Detailed
from facevae_jax.latents import paths
from facevae_jax.latents.priors import FLOW, GAUSSIAN
from facevae_jax.reporting.page import Bar, Bars, Block, Note, Picture, or_note, sheet
from facevae_jax.trained.directions import direction_of
from facevae_jax.trained.model import TrainedModel
from facevae_jax.trained.ranking import WEAK

COLUMNS = 8
GIVEN = 24  # faces of the evaluation split: three rows
SAMPLES = 32
PAIRS = 6  # of faces that are interpolated
CORNER_STEPS = 6  # from corner to corner of the square: 7 x 7 faces
TRAVERSED = 7  # dimensions
EDITED_ATTRIBUTES = 6
EDITED_FACES = 2
FIXED_FACES = 4  # whose groups of latents are fixed one after the other


class Given(NamedTuple):
    """The first faces of a split."""

    images: UInt8[np.ndarray, "n r r 3"]
    latents: Float32[np.ndarray, "n z"]  # means of their posteriors
    details: Float32[np.ndarray, "n d"]  # of a hierarchy's groups below the code


def given_faces(trained: TrainedModel, split: str) -> Given:
    """The first `GIVEN` faces of a split, or as many as there are.

    Raises:
      UserError: the data are not there.
    """
    rows = range(min(GIVEN, len(trained.dataset.images(split))))
    images = trained.dataset.read_rows(split, rows)
    return Given(images, trained.inference.encode(images).mean, trained.details(images))


def ends(trained: TrainedModel, given: Callable[[], Given], count: int, *, seed: int) -> tuple[Detailed, str]:
    """Latents to interpolate, and where they come from: given faces, or draws from a prior if there are too few."""
    with contextlib.suppress(UserError):  # the data are not there
        faces = given()
        if len(faces.latents) >= count:
            origin = f"the first {count} faces of the reconstructions"
            return Detailed(faces.latents[:count], faces.details[:count]), origin
    prior = trained.available_priors()[-1]
    codes = trained.sample_codes(count, prior=prior, seed=seed)
    return Detailed(codes, trained.sample_details(count, seed=seed)), f"{count} samples from the {prior} prior"


def reconstructions(trained: TrainedModel, given: Given) -> Picture:
    """Rows of originals, each above its reconstructions."""
    return sheet(
        pictures.in_pairs(given.images, trained.decode(given.latents, given.details)),
        alt=f"{len(given.images)} faces and their reconstructions",
        caption="Odd rows: originals. Even rows: their reconstructions, from the posteriors' means.",
    )


def samples(trained: TrainedModel, *, seed: int) -> list[Block]:
    """New faces from the learned prior where it was fitted, from the fitted Gaussian and from N(0, I)."""

    def drawn(prior: str, name: str) -> Picture:
        images = trained.sample(SAMPLES, prior=prior, seed=seed)
        images = images.reshape(-1, COLUMNS, *images.shape[1:])
        return sheet(images, alt=f"{SAMPLES} new faces from {name}", caption=f"From {name}.")

    return [
        *([drawn(FLOW, "the learned prior, a flow")] if FLOW in trained.available_priors() else []),
        *or_note(lambda: [drawn(GAUSSIAN, "the Gaussian fitted to the posteriors")]),
        drawn("standard", "the standard prior, N(0, I)"),
    ]


def groups(trained: TrainedModel, given: Given, *, seed: int) -> list[Block]:
    """Faces as more of a hierarchy's groups are theirs, from the top down; the others are drawn from their priors."""
    images, latents, details = (of[:FIXED_FACES] for of in given)
    drawn = trained.sample_details(len(images), seed=seed)
    codes = trained.sample_codes(len(images), prior=trained.available_priors()[-1], seed=seed)
    shapes = trained.inference.detail_shapes
    of_value = np.repeat([shape[0] for shape in shapes], [math.prod(shape) for shape in shapes])  # its resolution
    columns, labels = [images, trained.decode(codes, drawn)], ["the face", "none"]
    for resolution in [0, *np.unique(of_value)]:
        columns.append(trained.decode(latents, np.where(of_value <= resolution, details, drawn)))
        labels.append(f"to {resolution}x{resolution}" if resolution else "the code")
    return [
        sheet(
            np.stack(columns, axis=1),
            alt=f"{len(images)} faces in rows, of which more groups of latents are kept in each column",
            scale=labels,
        )
    ]


def interpolation(trained: TrainedModel, given: Callable[[], Given], *, seed: int) -> list[Block]:
    """Lines from face to face."""
    faces, origin = ends(trained, given, 2 * PAIRS, seed=seed)
    pairs = faces.codes.reshape(PAIRS, 2, -1)
    details = sheets.Details.of_paths(faces.details, COLUMNS - 1, rows=PAIRS)
    images = decode_rows(trained, np.stack([paths.path(stops, COLUMNS - 1) for stops in pairs]), details)
    return [
        sheet(
            images,
            alt=f"{PAIRS} rows of faces, each changing from one face to another",
            caption=f"Between {origin}.",
            scale=["from", *(f"{step / (COLUMNS - 1):.0%}" for step in range(1, COLUMNS - 1)), "to"],
        )
    ]


def morph(trained: TrainedModel, given: Callable[[], Given], *, seed: int) -> list[Block]:
    """The square between four faces."""
    corners, origin = ends(trained, given, 4, seed=seed)
    side = CORNER_STEPS + 1
    details = sheets.Details.of_square(corners.details, side=side)
    images = decode_rows(trained, paths.square(corners.codes, rows=side, columns=side), details)
    return [sheet(images, alt="A square of faces that mixes the four at its corners", caption=f"Between {origin}.")]


def traversal(trained: TrainedModel) -> list[Block]:
    """The mean face with one dimension changed in each row, the dimensions that change it most first."""
    chosen = sheets.strongest_dimensions(trained)[:TRAVERSED]
    named = ", ".join(map(str, chosen))
    return [
        sheet(
            decode_rows(trained, sheets.traversal(trained, trained.moments.mean.astype(np.float32), chosen)),
            alt=f"{len(chosen)} rows of faces, with one latent dimension changing in each",
            caption=f"Dimensions {named}, from top to bottom.",
            scale=scale_of_alphas(),
        )
    ]


def attributes(scores: Mapping[str, float]) -> list[Block]:
    """How well the codes predict each attribute, the best first."""
    if not scores:
        return [Note("Left out: the images have no labels with an order.")]
    return [Bars([Bar(name.replace("_", " "), value, weak=value < WEAK) for name, value in scores.items()])]


def edits(trained: TrainedModel, given: Given, scores: Mapping[str, float]) -> list[Block]:
    """A strip for each of the attributes that the codes predict best."""
    if not scores:
        return [Note("Left out: the images have no labels with an order.")]

    def strip(name: str) -> Picture:
        direction = direction_of(trained, name, method="mean")
        latents = np.stack([direction.edit(latent, ALPHAS) for latent in given.latents[:EDITED_FACES]])
        details = sheets.Details.of_rows(given.details, range(len(latents)), columns=len(ALPHAS))
        images = decode_rows(trained, latents, details)
        weak = "; weak: other things change more" if scores[name] < WEAK else ""
        return sheet(
            images,
            alt=f"Faces with less and more of {name}",
            caption=f"{name}, R² {scores[name]:.2f}{weak}",
            scale=scale_of_alphas(),
        )

    shown = list(scores)[:EDITED_ATTRIBUTES]
    return [block for name in shown for block in or_note(lambda name=name: [strip(name)])]  # type: ignore[misc]


def scale_of_alphas() -> list[str]:
    """Labels below the columns of edits and traversals."""
    return [f"{alpha:+g}".replace("-", "−") if alpha else "0" for alpha in ALPHAS]  # noqa: RUF001 - a minus sign
