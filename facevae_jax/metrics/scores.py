"""Scores of a trained model on a split, as one record for JSON."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32, Int, Shaped

from facevae_jax.core.progress import progress_bar
from facevae_jax.core.random import keys_of, named_key
from facevae_jax.data.feed import gather_rows
from facevae_jax.inference import Encoded, encode
from facevae_jax.latents.moments import Moments, moments_of
from facevae_jax.latents.priors import STANDARD
from facevae_jax.latents.priors.base import Prior, log_density, normal_by_index
from facevae_jax.metrics import images
from facevae_jax.metrics.images import ImageScores
from facevae_jax.metrics.likelihood import SEED, bound_once, check_draws, importance_bounds
from facevae_jax.models.api import Gaussian, Model, to_unit
from facevae_jax.models.likelihoods import GaussianLikelihood, LogisticLikelihood, PixelTerms
from facevae_jax.objective import bits_per_dim, gaussian_kl, image_terms
from facevae_jax.trained.model import TrainedModel
from facevae_jax.training.evaluation import ACTIVE_VARIANCE

DRAWS = (1, 10, 100)  # of the importance-weighted bound
BOUND_IMAGES = 256  # with that bound
RATED = 4_096  # codes that a prior's rate is computed from, at most


class Measured(NamedTuple):
    """Results for one batch, a row for each image."""

    posterior: Gaussian  # of the flat code
    scores: ImageScores  # of the reconstruction from the posteriors' means
    pixels: PixelTerms  # of one draw
    rates: Float[Array, "b g"]  # KL of each group of latents, nats


class Given(NamedTuple):
    """Images to measure."""

    pixels: Shaped[ArrayLike, "b h w c"]
    rows: Int[ArrayLike, " b"]  # in their split; row numbers decide the draws


def measure(model: Model, variables: Any, given: Given, *, likelihood: GaussianLikelihood) -> Measured:
    """Decodes twice: from the means of the latents, and from a draw that depends only on the image's row."""
    pixels, rows = (jnp.asarray(x) for x in given)
    targets = to_unit(pixels)
    posterior = encode(model, variables, pixels)
    of_mean = model.apply(variables, pixels, None, train=False).decoded.mean
    output = model.apply(variables, pixels, keys_of(named_key(SEED, "evaluate"), rows), train=False)
    terms = image_terms(targets, output, likelihood)
    rates = [jnp.sum(kl.reshape(len(kl), -1), axis=1) for kl in terms.kl]
    stacked = jnp.stack(rates, axis=1) if rates else jnp.zeros((len(rows), 0))
    return Measured(posterior, images.image_scores(targets, of_mean), terms.pixels, stacked)


def evaluate(
    model: TrainedModel,
    split: str = "",
    *,
    draws: Sequence[int] = DRAWS,
    bound_images: int = BOUND_IMAGES,
    priors: Sequence[str] = (STANDARD,),
) -> dict[str, Any]:
    """Scores of a model on a whole split, as `python -m facevae_jax.evaluate` writes them to JSON.

    Every image counts once, whatever the batch size.

    Args:
      model: from `load` or `train`.
      split: `train`, `validation` or `test`; empty: the one that the run was evaluated on.
      draws: values of K for the importance-weighted bound, each a multiple of the one before; () for none.
      bound_images: images that it is computed for, the first of the split.
      priors: names of the priors whose rates are computed.

    Returns:
      MSE, PSNR, SSIM and MS-SSIM of reconstructions, rate and distortion in nats, the importance-weighted bound, and
      figures of the codes.

    Raises:
      UserError: the data cannot be read, or have no such split.
    """
    if draws:
        check_draws(draws)
    split = split or model.dataset.evaluation_split
    pixels = model.dataset.images(split)
    measured = _measure_all(model, pixels)
    posterior = Encoded(*measured.posterior)
    record: dict[str, Any] = {
        "step": model.step,
        "data": model.dataset.name,
        "split": split,
        "images": len(pixels),
        "resolution": model.resolution,
        **model.dataset.preparation,
        "code_shape": list(model.code_shape),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"])),
        "reconstruction": {
            **{name: float(values.mean(dtype=np.float64)) for name, values in measured.scores._asdict().items()},
            "ms_ssim_scales": images.scales(model.resolution),
        },
        "latents": {
            "active_units": active_units(posterior),
            "aggregate_kl_to_prior": gaussian_kl_to_prior(moments_of(*posterior)),
        },
    }
    if not measured.rates.shape[1]:  # without a KL divergence there is no ELBO
        return record
    record["latents"]["kl_by_dimension"] = kl_by_dimension(posterior).tolist()
    record["likelihood"] = _elbo(model, measured)
    record["rates"] = {name: rate(model, model.prior(name), posterior) for name in priors}
    if draws:
        first = gather_rows(pixels, np.arange(min(bound_images, len(pixels))))
        bounds = importance_bounds(
            model.inference, first, likelihood=model.likelihood, variance=model.variance, draws=draws
        )
        means = {str(count): -float(values.mean()) for count, values in bounds.items()}
        record["importance"] = {"images": len(first), "bounds": means}
        if isinstance(model.likelihood, LogisticLikelihood):
            record["importance"]["bits_per_dim"] = {count: _bits_per_dim(model, nats) for count, nats in means.items()}
    return record


def kl_by_dimension(posterior: Encoded) -> Float32[np.ndarray, " z"]:
    """KL to N(0, 1) of each number of the code, nats, the mean over images."""
    kl = gaussian_kl(Gaussian(jnp.asarray(posterior.mean), jnp.asarray(posterior.log_variance)))
    return np.asarray(kl).mean(axis=0)


def active_units(posterior: Encoded) -> int:
    """Numbers of the code whose posterior means vary over the data by more than `ACTIVE_VARIANCE`."""
    return int(np.sum(posterior.mean.var(axis=0) > ACTIVE_VARIANCE))


def gaussian_kl_to_prior(moments: Moments) -> float:
    """KL(N(mean, covariance) || N(0, I)), nats: 1/2 (tr C + mᵀm - z - log det C).

    For the moments of the aggregate posterior it is the part of KL(q(z) || N(0, I)) that is due to mean and covariance:
    a lower bound on how far samples from N(0, I) are from the codes.
    """
    mean, covariance, _ = moments
    _, log_determinant = np.linalg.slogdet(covariance)
    return float(0.5 * (np.trace(covariance) + mean @ mean - len(mean) - log_determinant))


def rate(trained: TrainedModel, prior: Prior, posterior: Encoded) -> float:
    """KL(q(code | x) || prior) in nats, estimated from one draw for each of at most `RATED` images.

    For N(0, I) it is the KL of the loss, up to the noise of the draws. The better a prior describes the codes, the
    lower its rate; the negative ELBO with that prior is the distortion plus its rate. Of a hierarchy it is the rate of
    the code alone: the groups below it have their own.
    """
    mean, log_variance = (field[:RATED] for field in posterior)
    noise = np.asarray(normal_by_index(named_key(SEED, "rate"), np.arange(len(mean)), trained.code_size))
    codes = mean + np.exp(0.5 * log_variance) * noise
    entropy_term = -0.5 * np.sum(np.square(noise) + log_variance + np.log(2 * np.pi), axis=1)
    return float(np.mean(entropy_term - np.asarray(log_density(prior, codes))))


def _elbo(trained: TrainedModel, measured: Measured) -> dict[str, Any]:
    """Rate, distortion and their sum in nats; the variance of a Gaussian, or bits per pixel value of a discrete one.

    The negative ELBO with a Gaussian of the best variance compares models with different likelihoods.
    """
    means = PixelTerms(*(jnp.asarray(x.mean(dtype=np.float64)) for x in measured.pixels))
    distortion = float(trained.likelihood.nll(means, jnp.asarray(trained.variance)))
    rates = measured.rates.mean(axis=0, dtype=np.float64)
    rate, error, dimensions = float(rates.sum()), float(means.squared_error), trained.likelihood.dimensions
    found: dict[str, Any] = {"distortion": distortion, "rate": rate, "negative_elbo": distortion + rate}
    if len(rates) > 1:
        found["rates"] = rates.tolist()
    found["best_variance"] = error
    found["negative_elbo_at_best_variance"] = 0.5 * dimensions * (math.log(2 * math.pi * error) + 1) + rate
    if isinstance(trained.likelihood, LogisticLikelihood):
        found["bits"] = trained.likelihood.bits  # of each pixel value
        return found | {"bits_per_dim": _bits_per_dim(trained, distortion + rate)}
    return found | {"variance": trained.variance}


def _bits_per_dim(trained: TrainedModel, nats: float) -> float:
    """Of a discrete likelihood."""
    return bits_per_dim(nats, dimensions=trained.likelihood.dimensions, discrete=True)


def _measure_all(trained: TrainedModel, pixels: np.ndarray) -> Any:
    def batches() -> Iterator[Given]:
        for rows in trained.inference.batches(np.arange(len(pixels))):
            yield Given(gather_rows(pixels, rows), rows)

    measurer = bound_once(measure, likelihood=trained.likelihood)
    parts = []
    with progress_bar(total=len(pixels), description="evaluating") as progress:
        for part in trained.inference.map_stream(measurer, batches()):
            parts.append(part)
            progress.update(len(part.rates))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def table(record: dict[str, Any]) -> str:
    """A record as lines of text."""
    head = f"{record['data']}, {record['split']} split, {record['images']:,} images at {record['resolution']}x"
    lines = [f"{head}{record['resolution']}, step {record['step']:,}"]
    return "\n".join([*lines, *(f"  {name:<24}{value:>14}  {note}" for name, value, note in figures(record))])


def figures(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The scores of a record: name, value, and unit or explanation."""
    made, codes = record["reconstruction"], record["latents"]
    rows: list[tuple[str, float, str, str]] = [
        ("MSE", made["mse"], ".6f", "pixels from 0 to 1; of the reconstruction from the posteriors' means"),
        ("PSNR", made["psnr"], ".2f", "dB"),
        ("SSIM", made["ssim"], ".4f", "Gaussian window of 11, mean over channels"),
        ("MS-SSIM", made["ms_ssim"], ".4f", f"of {made['ms_ssim_scales']} scales"),
    ]
    if "likelihood" in record:
        nats = record["likelihood"]
        discrete = "bits_per_dim" in nats
        decoder = "discretized logistic" if discrete else f"Gaussian of variance {nats['variance']:.3g}"
        of = f"a probability of {nats['bits']}-bit pixels" if discrete else "a density over pixels from 0 to 1"
        rows += [
            ("Distortion", nats["distortion"], ",.1f", f"nats; {decoder}, one draw"),
            ("Rate", nats["rate"], ",.2f", "nats; KL(q(z|x) || p(z)), of all groups of latents"),
            ("-ELBO", nats["negative_elbo"], ",.1f", f"nats; of {of}"),
        ]
        if discrete:
            rows.append(("Bits/dim", nats["bits_per_dim"], ".4f", "-ELBO per pixel value"))
        else:
            variance, value = nats["best_variance"], nats["negative_elbo_at_best_variance"]
            rows.append(("-ELBO, best variance", value, ",.1f", f"nats; with {variance:.3g}, this split's optimum"))
    if "importance" in record:
        found = record["importance"]
        bits = {count: f", {value:.4f} bits/dim" for count, value in found.get("bits_per_dim", {}).items()}
        rows += [
            (
                f"Bound, K = {int(count):,}",
                value,
                ",.1f",
                f"nats, negative{bits.get(count, '')}; of {found['images']:,} images",
            )
            for count, value in found["bounds"].items()
        ]
    rows += [
        ("Active units", codes["active_units"], ",.0f", f"of {math.prod(record['code_shape'])}"),
        ("Aggregate KL", codes["aggregate_kl_to_prior"], ",.2f", "nats; of the latents' moments to N(0, I)"),
        *(
            (f"Rate, {name}", value, ",.2f", "nats; KL to this prior")
            for name, value in record.get("rates", {}).items()
            if name != STANDARD
        ),
    ]
    if "checkerboard" in record:
        rows += [
            (f"Checkerboard, {name}", value, ".3f", "power at (pi, pi) over that at (3 pi/4, 3 pi/4)")
            for name, value in record["checkerboard"].items()
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
    if "diagnosis" in record:
        rows += _diagnosis(record["diagnosis"])
    return [(name, format(value, form), note) for name, value, form, note in rows]


def _diagnosis(found: dict[str, Any]) -> list[tuple[str, float, str, str]]:
    """Where the distance of samples comes from."""
    what = {
        "data": "other faces of the split",
        "decoder": "their reconstructions",
        "posterior": "decoded draws from their posteriors",
        "prior": "samples",
    }
    rows = [
        (f"Distance of {what[name]}", value, ".5g", f"Fréchet; {name}: {found['parts'][name]:+.5g}")
        for name, value in found["distances"].items()
    ]
    share = found["parts"][found["largest"]] / max(found["distances"]["prior"], 1e-12)
    return [*rows, ("Largest part", share, ".0%", f"{found['largest']}; {found['remedy']}")]
