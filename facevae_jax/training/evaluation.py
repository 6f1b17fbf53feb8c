"""Evaluation as training goes: exact figures on the whole split, and pictures to look at."""

import concurrent.futures
import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from facevae_jax import pictures
from facevae_jax.data.batches import Batch, put, put_rows
from facevae_jax.data.plan import evaluation_rows
from facevae_jax.errors import make_writable_directory
from facevae_jax.latents.priors import LatentMoments, fitted_gaussian, standard
from facevae_jax.models.inference import Inference
from facevae_jax.objective import Loss
from facevae_jax.random import named_key
from facevae_jax.training.pca import eigenfaces
from facevae_jax.training.sharding import replicated, split_along
from facevae_jax.training.state import TrainState
from facevae_jax.training.step import (
    EvaluationSums,
    Trainer,
    evaluation_step,
    evaluation_variance,
    finish_evaluation,
)

PICTURES = "pictures"
SHOWN_SAMPLES = 64  # 8 x 8
SHOWN_FACES = 24  # three rows of originals, each above its reconstructions
COLUMNS = 8
BATCHES_IN_FLIGHT = 2
ASK_EVERY = 8  # batches, whether to go on


class Evaluator:
    """Evaluates one split; compiles once."""

    def __init__(self, trainer: Trainer, images: np.ndarray, mesh: Mesh) -> None:
        """`images` is the split's pixel store [N, R, R, 3]."""
        self._trainer = trainer
        self._images = images
        self._mesh = mesh
        self._step = jax.jit(functools.partial(evaluation_step, trainer=trainer))
        self._finish = jax.jit(functools.partial(finish_evaluation, trainer=trainer))
        latent_dim = trainer.config.model.latent_dim
        self._start = jax.jit(lambda: EvaluationSums.zeros(latent_dim), out_shardings=replicated(mesh))
        self._batch_size = trainer.config.train.batch_size // trainer.config.train.accumulation

    def __call__(
        self, state: TrainState, goes_on: Callable[[], bool] = lambda: True
    ) -> tuple[Loss, LatentMoments, jax.Array] | None:
        """The split's loss, its latents' moments and active units; every image counts once, whatever the batch size.

        None as soon as `goes_on`, which is asked every few batches, says so.
        """
        sums = self._start()
        sharding = split_along(self._mesh, 0)
        in_flight: list[EvaluationSums] = []
        batches = evaluation_rows(images=len(self._images), batch_size=self._batch_size)
        for number, (rows, valid) in enumerate(batches):
            if number % ASK_EVERY == 0 and not goes_on():
                return None
            batch = Batch(put_rows(self._images, rows, sharding), put(rows, sharding))
            sums = self._step(sums, state.evaluation_variables, batch, put(valid, sharding), np.int32(number))
            in_flight.append(sums)
            if len(in_flight) > BATCHES_IN_FLIGHT:  # or a large split would queue up in device memory
                jax.block_until_ready(in_flight.pop(0))
        params = state.evaluation_variables["params"]
        return self._finish(sums, evaluation_variance(state.decoder_variance, params, trainer=self._trainer))


class Painter:
    """Writes the same faces and the same random draws at every evaluation, so that progress is visible.

    Files are written by a thread while training goes on; use as a context manager, so that the last are finished.
    """

    def __init__(self, trainer: Trainer, images: np.ndarray, workdir: pathlib.Path) -> None:
        """`images` is the split whose first faces are reconstructed."""
        self._trainer = trainer
        self._originals = np.asarray(images[:SHOWN_FACES])
        self._directory = make_writable_directory(workdir / PICTURES, name="--workdir's pictures")
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._written: list[concurrent.futures.Future[None]] = []

    def __enter__(self) -> "Painter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.shutdown()
        if exception[0] is None:  # else that is what the user should hear of
            self._finish()

    def __call__(self, state: TrainState, *, step: int) -> None:
        """Draws reconstructions and samples from both priors, of PCA its components too, and has them written.

        Raises:
          OSError: the pictures before could not be written.
        """
        self._finish()
        # This process's own copy: the others draw nothing.
        variables, moments = jax.tree.map(
            lambda leaf: leaf.addressable_data(0), (state.evaluation_variables, state.latent_moments)
        )
        inference = Inference(self._trainer.model, variables)
        reconstructions = inference.reconstruct(self._originals)
        rows = [
            np.concatenate([part[start : start + COLUMNS] for part in (self._originals, reconstructions)])
            for start in range(0, len(self._originals) - len(self._originals) % COLUMNS, COLUMNS)
        ]
        shown = np.concatenate(rows) if rows else np.concatenate([self._originals, reconstructions])
        columns = COLUMNS if rows else len(self._originals)
        grids = {"reconstructions": pictures.grid(shown, columns=columns)}
        key = named_key(self._trainer.config.train.seed, "pictures")
        priors = {"standard": standard(len(moments.mean)), "gaussian": fitted_gaussian(moments)}
        for name, prior in priors.items():
            latents = np.asarray(prior.sample(key, np.arange(SHOWN_SAMPLES)))
            grids[f"samples_{name}"] = pictures.grid(inference.decode(latents), columns=COLUMNS)
        if self._trainer.config.model.kind == "pca":
            faces = eigenfaces(variables["params"], self._trainer.model.image_shape, SHOWN_SAMPLES)
            grids["eigenfaces"] = pictures.grid(faces, columns=COLUMNS)
        for name, image in grids.items():
            path = self._directory / f"{name}_{step:08d}.png"
            self._written.append(self._writer.submit(pictures.write_png, path, image))

    def _finish(self) -> None:
        """Waits for the files and raises what went wrong with them."""
        written, self._written = self._written, []
        for future in written:
            future.result()
