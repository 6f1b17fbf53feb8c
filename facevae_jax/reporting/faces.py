"""Sheets of faces: what the model makes of given ones, draws anew, and makes of a way through its latents."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from facevae_jax.data.layouts import Attribute
from facevae_jax.errors import UserError
from facevae_jax.generation import latent_tables, sheets
from facevae_jax.generation.directions import direction_of
from facevae_jax.generation.sheets import ALPHAS, COLUMNS, decode_rows
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents import arithmetic
from facevae_jax.latents.priors import PriorName
from facevae_jax.reporting.page import Block, Note, Picture, Section, or_note, section, sheet

GIVEN = 24  # faces of the evaluation split: three rows
SAMPLES = 32
PAIRS = 3  # of faces that are gone between
CORNER_STEPS = 6  # from corner to corner of the square: 7 x 7 faces
TRAVERSED = 8  # dimensions
EDITED_ATTRIBUTES = 5
EDITED_FACES = 2


class Given(NamedTuple):
    """The first faces of a split."""

    images: UInt8[np.ndarray, "n r r 3"]
    latents: Float32[np.ndarray, "n z"]  # means of their posteriors


def sections(trained: TrainedVAE, *, split: str, seed: int) -> list[Section]:
    """Reconstructions, samples, interpolation, morphing, traversal and edits.

    Args:
      trained: the model.
      split: that faces are taken from.
      seed: of the draws.
    """
    given = functools.cache(lambda: given_faces(trained, split))
    return [
        section(
            "reconstructions",
            "Reconstructions",
            f"The first faces of the {split} split, not chosen by anybody, each row above what encoder and decoder "
            "make of it: what is missing below, the latent does not hold.",
            lambda: [reconstructions(trained, given())],
        ),
        section(
            "samples",
            "Samples",
            "New faces, decoded from draws of a prior: from N(0, I), and from the Gaussian that was fitted to the "
            "posteriors. Where the second look much better, the posteriors lie elsewhere than N(0, I).",
            lambda: samples(trained, seed=seed),
        ),
        section(
            "interpolation",
            "Interpolation",
            "Each row leads along a line through the latents from the face at its left to that at its right; every "
            "picture between is decoded from the line, and a smooth way of faces shows that the space has no holes.",
            lambda: interpolation(trained, given, seed=seed),
        ),
        section(
            "morph",
            "Morphing between four faces",
            "The four corners are faces, and each picture between them mixes their latents by how near it is.",
            lambda: morph(trained, given, seed=seed),
        ),
        section(
            "traversal",
            "One dimension at a time",
            "Each row is the mean face with one latent dimension changed, from three standard deviations below the "
            "mean to three above; the dimensions that change it most first.",
            lambda: traversal(trained),
        ),
        section(
            "edits",
            "Edits",
            "w_new = w + alpha x eta: two faces with less and more of an attribute. The direction eta leads from the "
            "mean of the training latents without it to the mean of those with it, or along their slope where the "
            "label is a number. alpha counts standard deviations; 0 is the unchanged reconstruction.",
            lambda: edits(trained, given()),
        ),
    ]


def given_faces(trained: TrainedVAE, split: str) -> Given:
    """The first `GIVEN` faces of a split, or as many as there are.

    Raises:
      UserError: the data are not there.
    """
    rows = range(min(GIVEN, latent_tables.split_size(trained, split)))
    images = latent_tables.read_rows(trained, split, rows).images
    return Given(images, trained.encode(images).mean)


def ends(
    trained: TrainedVAE, given: Callable[[], Given], count: int, *, seed: int
) -> tuple[Float32[np.ndarray, "n z"], str]:
    """Latents to go between, and whose they are: given faces', or draws from a prior where there are not enough."""
    try:
        latents = given().latents[:count]
    except UserError:
        latents = np.empty((0, trained.latent_dim), np.float32)
    if len(latents) == count:
        return latents, f"the first {count} faces of the split"
    prior: PriorName = "gaussian" if float(trained.moments.images) else "standard"
    return trained.sample_latents(count, prior=prior, seed=seed), f"{count} samples from the {prior} prior"


def reconstructions(trained: TrainedVAE, given: Given) -> Picture:
    """Rows of originals, each above its reconstructions."""
    return sheet(
        sheets.in_pairs(given.images, trained.decode(given.latents)),
        alt=f"{len(given.images)} faces and their reconstructions",
        caption="Odd rows: originals. Even rows: their reconstructions, from the posteriors' means.",
    )


def samples(trained: TrainedVAE, *, seed: int) -> list[Block]:
    """New faces from both priors that every evaluated run has."""

    def drawn(prior: PriorName, name: str) -> Picture:
        images = trained.sample(SAMPLES, prior=prior, seed=seed)
        images = images.reshape(-1, COLUMNS, *images.shape[1:])
        return sheet(images, alt=f"{SAMPLES} new faces from {name}", caption=f"From {name}.")

    return [
        drawn("standard", "the standard prior, N(0, I)"),
        *or_note(lambda: [drawn("gaussian", "the Gaussian fitted to the posteriors")]),
    ]


def interpolation(trained: TrainedVAE, given: Callable[[], Given], *, seed: int) -> list[Block]:
    """Lines from face to face."""
    latents, origin = ends(trained, given, 2 * PAIRS, seed=seed)
    pairs = latents.reshape(PAIRS, 2, -1)
    images = decode_rows(trained, np.stack([arithmetic.path(stops, COLUMNS - 1) for stops in pairs]))
    return [
        sheet(
            images,
            alt=f"{PAIRS} rows of faces, each changing from one face to another",
            caption=f"Between {origin}.",
            scale=["from", *(f"{step / (COLUMNS - 1):.0%}" for step in range(1, COLUMNS - 1)), "to"],
        )
    ]


def morph(trained: TrainedVAE, given: Callable[[], Given], *, seed: int) -> list[Block]:
    """The square between four faces."""
    corners, origin = ends(trained, given, 4, seed=seed)
    side = CORNER_STEPS + 1
    images = decode_rows(trained, arithmetic.square(corners, rows=side, columns=side))
    return [sheet(images, alt="A square of faces that mixes those at its corners", caption=f"Between {origin}.")]


def traversal(trained: TrainedVAE) -> list[Block]:
    """The dimensions that change the mean face most, one a row."""
    chosen = sheets.strongest_dimensions(trained)[:TRAVERSED]
    named = ", ".join(map(str, chosen))
    return [
        sheet(
            decode_rows(trained, sheets.traversal(trained, trained.mean_latent, chosen)),
            alt=f"{len(chosen)} rows of faces, in each of which one latent dimension changes",
            caption=f"Dimensions {named}, from top to bottom.",
            scale=scale_of_alphas(),
        )
    ]


def edits(trained: TrainedVAE, given: Given) -> list[Block]:
    """A strip for each of a few attributes, with what its direction was found from."""
    shown = sheets.shown_attributes(sheets.editable(latent_tables.attributes_of(trained)), EDITED_ATTRIBUTES)
    if not shown:
        return [Note("Left out: the images have no labels with an order.")]

    def strip(attribute: Attribute) -> Picture:
        direction = direction_of(trained, attribute.name, method="mean")
        images = decode_rows(
            trained, np.stack([direction.edit(latent, ALPHAS) for latent in given.latents[:EDITED_FACES]])
        )
        return sheet(
            images,
            alt=f"Faces with less and more of {attribute.name}",
            caption=direction.describe(),
            scale=scale_of_alphas(),
        )

    return [
        block
        for attribute in shown
        for block in or_note(lambda attribute=attribute: [strip(attribute)])  # type: ignore[misc]
    ]


def scale_of_alphas() -> list[str]:
    """What stands below the columns of edits and traversals."""
    return [f"{alpha:+g}".replace("-", "−") if alpha else "0" for alpha in ALPHAS]  # noqa: RUF001 - a minus sign
