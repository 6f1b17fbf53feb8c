"""Everything that is measured about a trained model on a split, as one JSON-able record."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from facevae_jax.data.batches import gather_rows
from facevae_jax.data.pixels import open_split
from facevae_jax.generation import fitting, latent_tables
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents.priors import PriorName, moments_of, normal_by_index
from facevae_jax.metrics import images, latents, likelihood
from facevae_jax.metrics.images import ImageScores
from facevae_jax.metrics.likelihood import SEED
from facevae_jax.models.inference import Encoded
from facevae_jax.models.vae import VAE, Posterior, to_unit
from facevae_jax.objective import bits_per_dim
from facevae_jax.progress import progress_bar
from facevae_jax.random import named_key

DRAWS = (1, 10, 100)  # of the importance-weighted bound
BOUND_IMAGES = 256  # that it is computed for


class Measured(NamedTuple):
    """What one batch gives, a row for each image."""

    posterior: Posterior
    scores: ImageScores  # of the reconstruction from the posterior's mean
    distortion: Float[Array, " b"]  # of one draw: -log p(x | z), nats
    squared_error: Float[Array, " b"]  # of that draw's reconstruction, the mean per pixel value


class Given(NamedTuple):
    """Images to measure."""

    pixels: Shaped[ArrayLike, "b h w c"]
    rows: Int[ArrayLike, " b"]  # in their split, which decide the draws
    variance: Float[ArrayLike, " b"]  # of the decoder's Gaussian, if it is one


def measure(model: VAE, variables: Any, given: Given) -> Measured:
    """Encodes, and decodes twice: from the mean and from a draw, which depends on the image's row alone."""
    pixels, rows, variance = (jnp.asarray(x) for x in given)
    targets = to_unit(pixels)
    posterior: Any = model.apply(variables, pixels, method="encode")
    noise = normal_by_index(named_key(SEED, "evaluate"), rows, posterior.mean.shape[1])
    of_mean: Any = model.apply(variables, posterior.mean, method="decode")
    of_draw: Any = model.apply(variables, posterior.sample(noise), method="describe")
    distortion = -likelihood.log_likelihood(targets, of_draw, variance)
    error = jnp.mean(jnp.square(targets - of_draw.images), axis=(1, 2, 3))
    return Measured(posterior, images.image_scores(targets, of_mean), distortion, error)


def evaluate(
    trained: TrainedVAE,
    split: str = "",
    *,
    draws: Sequence[int] = DRAWS,
    bound_images: int = BOUND_IMAGES,
    priors: Sequence[PriorName] = ("standard",),
) -> dict[str, Any]:
    """Scores of a model on a whole split; every image counts once, whatever the batch size.

    Args:
      trained: the model.
      split: `train` or `validation`; empty: the one that the run was evaluated on.
      draws: values of K for the importance-weighted bound, each a multiple of the one before; () for none.
      bound_images: for how many images it is computed, the split's first ones.
      priors: whose rates are given.

    Raises:
      UserError: the data are not there, or have no such split.
    """
    if draws:
        likelihood.check_draws(draws)
    split = split or latent_tables.evaluation_split(trained)
    pixels = open_split(trained.config.data, split)
    measured = _measure_all(trained, pixels)
    posterior = Encoded(*measured.posterior)
    record: dict[str, Any] = {
        "step": trained.step,
        "data": trained.config.data.name,
        "split": split,
        "images": len(pixels),
        "resolution": trained.resolution,
        "latent_dim": trained.latent_dim,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.variables["params"])),
        "reconstruction": {
            **{name: float(values.mean(dtype=np.float64)) for name, values in measured.scores._asdict().items()},
            "ms_ssim_scales": images.scales(trained.resolution),
        },
        "latents": {
            "active_units": latents.active_units(posterior),
            "aggregate_kl_to_prior": latents.gaussian_kl_to_prior(*moments_of(*posterior)),
        },
    }
    if trained.config.model.kind != "vae":  # a code that is a point has no density to speak of
        return record
    kl = latents.kl_by_dimension(posterior)
    record["latents"]["kl_by_dimension"] = kl.tolist()
    record["likelihood"] = _elbo(trained, measured, kl, dimensions=pixels[0].size)
    record["rates"] = {name: fitting.rate(trained, name, posterior) for name in priors}
    if draws:
        first = slice(min(bound_images, len(pixels)))
        bounds = likelihood.importance_bounds(
            trained.inference,
            gather_rows(pixels, np.arange(first.stop)),
            Encoded(*(field[first] for field in posterior)),
            variance=trained.variance,
            draws=draws,
        )
        means = {str(count): -float(values.mean()) for count, values in bounds.items()}
        record["importance"] = {"images": first.stop, "bounds": means}
    return record


def _elbo(trained: TrainedVAE, measured: Measured, kl: Float[np.ndarray, " z"], *, dimensions: int) -> dict[str, float]:
    """Rate and distortion, nats, and their sum; of a Gaussian its variance, of a probability bits per pixel value.

    And one likelihood that models compare by whatever they were trained with: a Gaussian of the variance that is best.
    """
    distortion, error = (float(x.mean(dtype=np.float64)) for x in (measured.distortion, measured.squared_error))
    rate = float(kl.sum(dtype=np.float64))
    found = {"distortion": distortion, "rate": rate, "negative_elbo": distortion + rate}
    found["best_variance"] = error
    found["negative_elbo_at_best_variance"] = 0.5 * dimensions * (math.log(2 * math.pi * error) + 1) + rate
    if trained.config.objective.is_discrete:
        return found | {"bits_per_dim": bits_per_dim(distortion + rate, dimensions=dimensions, discrete=True)}
    return found | {"variance": trained.variance}


def _measure_all(trained: TrainedVAE, pixels: np.ndarray) -> Any:
    size = trained.inference.batch_size

    def batches() -> Iterator[Given]:
        for at in range(0, len(pixels), size):
            rows = np.arange(at, min(at + size, len(pixels)))
            yield Given(gather_rows(pixels, rows), rows, np.full(len(rows), trained.variance, np.float32))

    parts = []
    with progress_bar(total=len(pixels), description="evaluating") as progress:
        for part in trained.inference.map_stream(measure, batches()):
            parts.append(part)
            progress.update(len(part.distortion))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def table(record: dict[str, Any]) -> str:
    """A record as lines to read."""
    head = f"{record['data']}, {record['split']} split, {record['images']:,} images at {record['resolution']}x"
    lines = [f"{head}{record['resolution']}, step {record['step']:,}"]
    return "\n".join([*lines, *(f"  {name:<24}{value:>14}  {note}" for name, value, note in figures(record))])


def figures(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What a record says: the name of each score, its value, and its unit or what it is of."""
    made, codes = record["reconstruction"], record["latents"]
    rows: list[tuple[str, float, str, str]] = [
        ("MSE", made["mse"], ".6f", "pixels from 0 to 1; of the posterior mean's reconstruction"),
        ("PSNR", made["psnr"], ".2f", "dB"),
        ("SSIM", made["ssim"], ".4f", "Gaussian window of 11, mean over channels"),
        ("MS-SSIM", made["ms_ssim"], ".4f", f"of {made['ms_ssim_scales']} scales"),
    ]
    if "likelihood" in record:
        nats = record["likelihood"]
        discrete = "bits_per_dim" in nats
        decoder = "discretized logistic" if discrete else f"Gaussian of variance {nats['variance']:.3g}"
        of = "a probability of 8-bit pixels" if discrete else "a density over pixels from 0 to 1"
        rows += [
            ("Distortion", nats["distortion"], ",.1f", f"nats; {decoder}, one draw"),
            ("Rate", nats["rate"], ",.2f", "nats; KL(q(z|x) || N(0, I))"),
            ("-ELBO", nats["negative_elbo"], ",.1f", f"nats; of {of}"),
        ]
        if discrete:
            rows.append(("Bits/dim", nats["bits_per_dim"], ".4f", "-ELBO per pixel value"))
        else:
            variance, value = nats["best_variance"], nats["negative_elbo_at_best_variance"]
            rows.append(("-ELBO, best variance", value, ",.1f", f"nats; with {variance:.3g}, this split's optimum"))
    if "importance" in record:
        shown = record["importance"]["images"]
        rows += [
            (f"Bound, K = {int(count):,}", value, ",.1f", f"nats, negative; of {shown:,} images")
            for count, value in record["importance"]["bounds"].items()
        ]
    rows += [
        ("Active units", codes["active_units"], ",.0f", f"of {record['latent_dim']}"),
        ("Aggregate KL", codes["aggregate_kl_to_prior"], ",.2f", "nats; of the latents' moments to N(0, I)"),
        *(
            (f"Rate, {name}", value, ",.2f", "nats; KL to this prior")
            for name, value in record.get("rates", {}).items()
            if name != "standard"
        ),
    ]
    for key, of in (("features", "by the features"), ("inception", "by Inception's")):
        if key in record:
            found = record[key]
            resized = f", resized {found['resize']}" if "resize" in found else ""
            compared = f"{of}; {found['images']:,} images, {found['split']} split, prior {found['prior']}{resized}"
            rows += [
                (name.replace("_", " "), value, ".5g", compared)
                for name, value in found.items()
                if name.startswith(("sample_", "reconstruction_", "interpolation_"))
            ]
    return [(name, format(value, form), note) for name, value, form, note in rows]
