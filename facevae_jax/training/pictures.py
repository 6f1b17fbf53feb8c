"""Pictures as training goes: the same faces and the same draws at every evaluation, so that progress is visible."""

import concurrent.futures
import contextlib
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from facevae_jax.core import pictures
from facevae_jax.core.errors import make_writable_directory
from facevae_jax.core.random import named_key
from facevae_jax.data.feed import gather_rows
from facevae_jax.inference import Inference
from facevae_jax.latents.moments import moments_of
from facevae_jax.latents.priors.gaussian import Gaussian, GaussianPrior, StandardPrior
from facevae_jax.training.setup import TrainSetup, TrainState

PICTURES = "pictures"
SHOWN_SAMPLES = 64  # 8 x 8
SHOWN_FACES = 24  # three rows of originals, each above its reconstructions
COLUMNS = 8
MOMENT_IMAGES = 1_024  # of the training split that the Gaussian of the samples is fitted to, at least
MAX_CODE = 2_048  # numbers of a code, beyond which fitting a Gaussian would hold up training


class PictureWriter:
    """Writes reconstructions and samples at every evaluation.

    A thread writes the files while training continues. Use as a context manager, which waits for the last ones.
    """

    def __init__(
        self,
        setup: TrainSetup,
        train: np.ndarray,
        evaluation: np.ndarray,
        workdir: pathlib.Path,
        show: Callable[[str, np.ndarray, int], None],
    ) -> None:
        """Takes the pixel stores of the training split and of the one whose first faces are reconstructed.

        `show` is called with the name, the pixels [H, W, 3] and the step of each picture.
        """
        self._show = show
        self._model, self._seed = setup.model, setup.config.train.seed
        self._train, self._originals = train, np.asarray(evaluation[:SHOWN_FACES])
        self._directory = make_writable_directory(workdir / PICTURES, name="--workdir's pictures")
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._written: list[concurrent.futures.Future[None]] = []

    def __enter__(self) -> "PictureWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.shutdown()
        if exception[0] is None:  # else that error is the one to report
            self._finish()

    def __call__(self, state: TrainState, *, step: int) -> None:
        """Draws reconstructions and samples from N(0, I) and, for codes that are not large, a fitted Gaussian.

        Raises:
          OSError: the pictures before could not be written.
        """
        self._finish()
        # This process's own copy: the others draw nothing.
        variables = jax.tree.map(lambda leaf: leaf.addressable_data(0), state.evaluation_variables)
        inference = Inference(self._model, variables)
        key = named_key(self._seed, "pictures")
        grids = {"reconstructions": pictures.in_pairs(self._originals, inference.reconstruct(self._originals))}
        priors: dict[str, Gaussian] = {"standard": StandardPrior.of_size(inference.code_size)}
        if inference.code_size <= MAX_CODE:
            rows = np.arange(min(len(self._train), max(MOMENT_IMAGES, 2 * inference.code_size)))
            posteriors = inference.encode(gather_rows(self._train, rows))
            # The codes of a run that diverges are not finite: then there is no Gaussian, and no picture of it.
            with np.errstate(all="ignore"), contextlib.suppress(np.linalg.LinAlgError):
                priors["gaussian"] = GaussianPrior.of(moments_of(*posteriors))
        for name, prior in priors.items():
            codes = np.asarray(prior.sample(key, np.arange(SHOWN_SAMPLES)))
            draws = inference.decode_draws(
                inference.batches(codes), seed=self._seed, temperatures=[1.0] * len(inference.detail_shapes)
            )
            images = np.concatenate(list(draws))
            grids[f"samples_{name}"] = images.reshape(-1, COLUMNS, *self._originals.shape[1:])
        for name, images in grids.items():
            path = self._directory / f"{name}_{step:08d}.png"
            grid = pictures.grid(images.reshape(-1, *images.shape[2:]), columns=images.shape[1])
            self._written.append(self._writer.submit(pictures.write_png, path, grid))
            self._show(name, grid, step)

    def _finish(self) -> None:
        """Waits for the files and raises what went wrong with them."""
        written, self._written = self._written, []
        for future in written:
            future.result()
