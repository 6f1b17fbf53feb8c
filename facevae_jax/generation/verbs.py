"""The verbs of `python -m facevae_jax.generate VERB`, each a function of a model and a request."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from facevae_jax.core import pictures
from facevae_jax.core.errors import UserError, expand_home, writable_file
from facevae_jax.data.sources.photographs import list_photographs, photograph_blocks
from facevae_jax.generation import outputs, sheets
from facevae_jax.inference import Detailed, Encoded
from facevae_jax.latents import paths
from facevae_jax.latents.directions import Direction, EditMethod
from facevae_jax.latents.priors import FLOW
from facevae_jax.latents.temperature import Temperature
from facevae_jax.trained import codes, familiarity
from facevae_jax.trained.directions import direction_of
from facevae_jax.trained.edit_curves import METHOD, Curve, curve_of
from facevae_jax.trained.model import TrainedModel

SHOWN_FACES = 24  # reconstructed by default
SHOWN_ROWS = 4  # of edits and interpolations
MAX_ALPHA = 10.0  # standard deviations; a decoder has never seen latents beyond
SHOWN_DIMENSIONS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The flags of a call by their names; None and () stand for the verb's default."""

    output: str | None = None
    format: str | None = None
    count: int | None = None
    images: Sequence[str] = ()
    split: str | None = None
    rows: Sequence[int] = ()
    prior: str | None = None
    temperature: Temperature = 1.0
    seed: int = 0
    posterior: str = "mean"
    detail: Literal["keep", "prior", "mean"] = "keep"
    detail_seed: int | None = None
    steps: int = 8
    path: paths.Path = "lerp"
    loop: bool = False
    attribute: Sequence[str] = ()
    keep: Sequence[str] = ()
    direction: EditMethod | Literal["curve"] = "mean"
    alpha: Sequence[float] = sheets.ALPHAS
    dimensions: Sequence[int] = ()
    fps: float = 12.0
    scale: int = 1
    labels: bool = False


class Start(NamedTuple):
    """Faces that a verb starts from."""

    latents: Float32[np.ndarray, "n z"]
    details: Float32[np.ndarray, "n d"]  # of a hierarchy's groups below the code
    originals: UInt8[np.ndarray, "n r r 3"] | None  # None if they were drawn from a prior
    names: tuple[str, ...]


def sample(trained: TrainedModel, request: Request) -> str:
    """New faces from a prior."""
    count = request.count or 64
    to = _destination(request, verb="sample")
    outputs.check_room(to, count=count, resolution=trained.resolution, any_number=True)
    if request.attribute and request.prior not in (None, FLOW):
        raise UserError(f"--attribute needs --prior={FLOW}, not {request.prior}: only that one knows the labels.")
    name = request.prior or trained.default_prior
    prior = trained.prior_given(request.attribute) if request.attribute else name
    faces = trained.sample_stream(
        count,
        prior=prior,
        temperature=request.temperature,
        seed=request.seed,
        details=request.detail != "mean",
        detail_seed=request.detail_seed,
    )
    outputs.write_stream(to, faces, count=count)
    given = f" given {', '.join(request.attribute)}" if request.attribute else ""
    return f"{to.path}: {count:,} faces from step {trained.step:,}, prior {name}{given}"


def reconstruct(trained: TrainedModel, request: Request) -> str:
    """Photographs, or images of a split, through the encoder and the decoder."""
    to = _destination(request, verb="reconstruct")
    grid = to.format == "grid"
    names, blocks = _given_faces(trained, request, most=SHOWN_FACES if grid else None)
    if grid:
        outputs.check_room(to, count=2 * len(names), resolution=trained.resolution)
        images = np.concatenate(list(blocks))
        faces = _encode(trained, images, request)
        pairs = pictures.in_pairs(images, trained.decode(faces.codes, faces.details))
        rows, columns = pairs.shape[:2]
        labels = outputs.Labels(["original", "model"] * (rows // 2))
        outputs.write_stream(to, pairs, count=rows * columns, columns=columns, labels=labels)
        return f"{to.path}: {len(names)} faces, each row above its reconstructions"
    starts = itertools.count(0, trained.inference.batch_size)
    encoded = (_encode(trained, block, request, first=at) for at, block in zip(starts, blocks, strict=False))
    outputs.write_stream(to, trained.inference.decode_detailed(encoded), count=len(names), names=names)
    return f"{to.path}: {len(names):,} reconstructions"


def encode(trained: TrainedModel, request: Request) -> str:
    """Codes of photographs, or of a split with its labels, as .npz or Parquet."""
    output = expand_home(request.output or "latents.npz", name="--output")
    if output.suffix not in (".npz", ".parquet"):
        raise UserError(f"--output={str(output)!r} must end in .npz or .parquet.")
    writable_file(output, name="--output")
    if request.images:
        table = codes.encode_photographs(trained.inference, request.images, resolution=trained.resolution)
    else:
        table = trained.codes.table(request.split or trained.dataset.evaluation_split)
    if request.posterior == "sample":
        draws = trained.posterior_sample(table.posterior, seed=request.seed)
        table = table._replace(posterior=table.posterior._replace(mean=draws))
    shaped = (field.reshape(-1, *trained.code_shape) for field in table.posterior)
    table = table._replace(posterior=Encoded(*shaped))
    writer = codes.write_npz if output.suffix == ".npz" else codes.write_parquet
    writer(output, table)
    labels = f", {len(table.labels.attributes)} attributes" if table.labels.attributes else ""
    return f"{output}: {len(table.names):,} codes of {trained.code_size} numbers{labels}"


def interpolate(trained: TrainedModel, request: Request) -> str:
    """Paths from face to face: through all photographs, or between pairs of new faces."""
    to = _destination(request, verb="interpolate")
    existing = uses_existing_faces(request)
    start = _start(trained, request, default=SHOWN_ROWS if existing else 2 * SHOWN_ROWS, each=1 if existing else 2)
    if len(start.latents) < 2:
        raise UserError(f"{len(start.latents)} face: give two or more.")
    stops = start.latents[None] if existing else start.latents.reshape(-1, 2, trained.code_size)
    pieces = len(stops[0]) - (not request.loop)
    _check_room(trained, to, len(stops) * (pieces * request.steps + (not request.loop)))
    rows = [paths.path(row, request.steps, method=request.path, loop=request.loop) for row in stops]
    stops_at = {request.steps * number: name for number, name in enumerate(start.names if existing else ())}
    labels = outputs.Labels([""] if existing else (), [stops_at.get(column, "") for column in range(len(rows[0]))])
    details = sheets.Details.of_paths(start.details, request.steps, rows=len(stops), loop=request.loop)
    _write(trained, to, np.stack(rows), request, details=details, labels=labels)  # a loop leads back by itself
    return f"{to.path}: {len(rows)} x {len(rows[0])} faces by {request.path}"


def morph(trained: TrainedModel, request: Request) -> str:
    """Faces between two photographs, at the ends of a strip, or four, at the corners of a square."""
    to = _destination(request, verb="morph")
    start = _start(trained, request, default=0)
    if len(start.latents) not in (2, 4):
        raise UserError(
            f"morph takes two faces, or four for a square, not {len(start.latents)}: give --images=A,B or --rows=I,J."
        )
    if len(start.latents) == 4:
        side = request.steps + 1
        # An animation visits the corners in turn: the square's inside has no order.
        if to.format in outputs.ANIMATED:
            around = [0, 1, 3, 2]
            latents = paths.path(start.latents[around], request.steps, method=request.path, loop=True)[None]
            details = sheets.Details.of_paths(start.details[around], request.steps, loop=True)
        else:
            _check_room(trained, to, side**2)
            latents = paths.square(start.latents, rows=side, columns=side, method=request.path)
            details = sheets.Details.of_square(start.details, side=side)
        labels = outputs.Labels(*([f"{place / request.steps:.2f}" for place in range(side)],) * 2)
        _write(trained, to, latents, request, details=details, labels=labels)
        return f"{to.path}: {latents.shape[0]} x {latents.shape[1]} faces between four"
    _check_room(trained, to, request.steps + 3)
    latents = paths.path(start.latents, request.steps, method=request.path)[None]
    details = sheets.Details.of_paths(start.details, request.steps)
    count = latents.shape[1]
    if to.format == "grid" and start.originals is not None:
        (between,) = sheets.decode_rows(trained, latents, details)
        faces = np.concatenate([start.originals[:1], between, start.originals[1:]])
        count = len(faces)
        labels = outputs.Labels([""], [start.names[0], *[""] * (count - 2), start.names[1]])
        outputs.write_stream(to, [faces], count=count, columns=count, labels=labels)
    else:
        names = [f"{column:03d}" for column in range(count)]
        _write(trained, to, latents, request, details=details, names=names, loop_back=request.loop)
    return f"{to.path}: from {start.names[0]} to {start.names[1]}, {count} pictures"


def edit(trained: TrainedModel, request: Request) -> str:
    """w_new = w + alpha x eta: faces with less and more of an attribute, a row for each face and attribute."""
    if not request.attribute:
        raise UserError("--attribute is missing: name what to edit, such as --attribute=smile or Smiling.")
    check_alphas(request.alpha)
    to = _destination(request, verb="edit")
    directions = [_edit_of(trained, name, request) for name in request.attribute]
    start = _start(trained, request, default=SHOWN_ROWS)
    pairs = list(itertools.product(range(len(start.latents)), directions))
    _check_room(trained, to, len(pairs) * len(request.alpha))
    latents = np.stack([direction.edit(start.latents[row], request.alpha) for row, direction in pairs])
    details = sheets.Details.of_rows(start.details, [row for row, _ in pairs], columns=len(request.alpha))
    names = [
        f"{start.names[row]}_{direction.attribute}_{alpha:+g}" for row, direction in pairs for alpha in request.alpha
    ]
    rows = [f"{start.names[row]}, {direction.attribute}" for row, direction in pairs]
    labels = outputs.Labels(rows, _signed(request.alpha))
    _write(trained, to, latents, request, details=details, names=names, labels=labels, loop_back=request.loop)
    lines = [direction.describe() for direction in directions]
    return "\n".join([*lines, f"{to.path}: {len(pairs)} rows, alpha {', '.join(f'{a:g}' for a in request.alpha)}"])


def traverse(trained: TrainedModel, request: Request) -> str:
    """One latent dimension in each row, by default those that change the face most."""
    check_alphas(request.alpha)
    to = _destination(request, verb="traverse")
    if wrong := [d for d in request.dimensions if not 0 <= d < trained.code_size]:
        raise UserError(f"--dimensions={wrong[0]}: the latents have dimensions 0 to {trained.code_size - 1}.")
    dimensions = request.dimensions or sheets.strongest_dimensions(trained)[: request.count or SHOWN_DIMENSIONS]
    start = _start(trained, request, default=1) if uses_existing_faces(request) else None
    base = start.latents[0] if start else trained.moments.mean.astype(np.float32)
    latents = sheets.traversal(trained, base, dimensions, request.alpha)
    columns = len(request.alpha)
    details = sheets.Details.of_rows(start.details, [0] * len(dimensions), columns=columns) if start else None
    names = [f"dimension_{dimension:03d}_{alpha:+g}" for dimension in dimensions for alpha in request.alpha]
    labels = outputs.Labels([f"dimension {number}" for number in dimensions], _signed(request.alpha))
    _write(trained, to, latents, request, details=details, names=names, labels=labels, loop_back=request.loop)
    return f"{to.path}: dimensions {', '.join(map(str, dimensions))}, from top to bottom"


VERBS = {function.__name__: function for function in (sample, reconstruct, interpolate, morph, edit, traverse, encode)}


def check_alphas(alphas: Sequence[float]) -> None:
    """Raises a UserError unless there are values, all within `MAX_ALPHA`."""
    if not alphas:
        raise UserError("--alpha is empty: give one or more numbers, such as --alpha=-2,0,2.")
    if wrong := [alpha for alpha in alphas if not abs(alpha) <= MAX_ALPHA]:
        raise UserError(
            f"--alpha={wrong[0]:g} is out of range: it counts standard deviations, {-MAX_ALPHA:g} to {MAX_ALPHA:g}."
        )


def _signed(alphas: Sequence[float]) -> list[str]:
    return [f"{alpha:+g}" if alpha else "0" for alpha in alphas]


def _edit_of(trained: TrainedModel, attribute: str, request: Request) -> Direction | Curve:
    """The direction or curve of an attribute."""
    if request.direction == METHOD:
        return curve_of(trained, attribute, keep=request.keep)
    return direction_of(trained, attribute, method=request.direction, keep=request.keep)


def _given_faces(
    trained: TrainedModel, request: Request, *, most: int | None = None
) -> tuple[tuple[str, ...], Iterator[np.ndarray]]:
    """Names of the requested photographs or rows of a split, and the images in batches.

    Without `request.rows` the first `request.count` are taken; without that too, all photographs, and of a split the
    first `most`, or all.
    """
    size = trained.inference.batch_size
    if request.images:
        files = list_photographs(request.images)[: request.count]
        names = tuple(file.stem for file in files)
        blocks = photograph_blocks(files, resolution=trained.resolution, size=size)
        return names, _noting_unlike(trained, names, blocks)
    split = request.split or trained.dataset.evaluation_split
    rows = request.rows or range(len(trained.dataset.images(split)))[: request.count or most]
    names = tuple(f"{split}_{row}" for row in rows)
    return names, (trained.dataset.read_rows(split, rows[at : at + size]) for at in range(0, len(rows), size))


def _noting_unlike(trained: TrainedModel, names: Sequence[str], blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks, with a line on standard error for photographs that are far from what the model was trained on."""
    at = 0
    for block in blocks:
        unlike = familiarity.unlike_training(trained, block)
        if unlike.any():
            print(
                f"note: {familiarity.note([names[at + row] for row in np.flatnonzero(unlike).tolist()])}",
                file=sys.stderr,
            )
        at += len(block)
        yield block


def uses_existing_faces(request: Request) -> bool:
    """Whether the request names images, rather than samples."""
    return bool(request.images or request.rows or request.split)


def _destination(request: Request, *, verb: str) -> outputs.Destination:
    return outputs.choose(request.output, request.format, verb=verb, scale=request.scale, labels=request.labels)


def _check_room(trained: TrainedModel, to: outputs.Destination, count: int) -> None:
    outputs.check_room(to, count=count, resolution=trained.resolution)


def _start(trained: TrainedModel, request: Request, *, default: int, each: int = 1) -> Start:
    """The requested faces, encoded; without any, `each` times `request.count`, or `default`, new ones."""
    if uses_existing_faces(request):
        names, blocks = _given_faces(trained, request, most=max(default, 1))
        images = np.concatenate(list(blocks))
        faces = _encode(trained, images, request)
        return Start(faces.codes, faces.details, images, names)
    count = each * request.count if request.count else default
    latents = trained.sample_codes(count, prior=request.prior, temperature=request.temperature, seed=request.seed)
    details = _drawn(trained, count, request)
    return Start(latents, details, None, tuple(f"sample_{number}" for number in range(count)))


def _encode(trained: TrainedModel, images: np.ndarray, request: Request, *, first: int = 0) -> Detailed:
    """Latents of images; draws are numbered from `first`."""
    posterior = trained.inference.encode(trained.check_images(images))
    code = posterior.mean
    if request.posterior == "sample":
        code = trained.posterior_sample(posterior, seed=request.seed, first=first)
    if request.detail == "keep":
        return Detailed(code, trained.details(images))
    return Detailed(code, _drawn(trained, len(images), request, first=first))


def _drawn(trained: TrainedModel, count: int, request: Request, *, first: int = 0) -> np.ndarray:
    """Values of the groups below the code, drawn from N(0, I); zeros where their priors' means are asked for."""
    if request.detail == "mean":
        return np.zeros((count, trained.detail_size), np.float32)
    seed = request.seed if request.detail_seed is None else request.detail_seed
    return trained.sample_details(count, temperature=request.temperature, seed=seed, first=first)


def _write(
    trained: TrainedModel,
    to: outputs.Destination,
    latents: np.ndarray,
    request: Request,
    *,
    details: sheets.Details | None = None,
    loop_back: bool = False,
    names: Sequence[str] | None = None,
    labels: outputs.Labels = outputs.NO_LABELS,
) -> None:
    rows, columns = latents.shape[:2]
    if to.format in outputs.ANIMATED:
        images = sheets.decode_rows(trained, latents, details)
        outputs.write_animation(to, images, frames_per_second=request.fps, loop_back=loop_back)
        return
    names = names or [f"row_{row:03d}_{column:03d}" for row in range(rows) for column in range(columns)]
    faces = sheets.decode_stream(trained, latents, details)
    outputs.write_stream(to, faces, count=rows * columns, columns=columns, names=names, labels=labels)
