"""What an evaluation costs beside the forward passes that it needs: encoding every image, and decoding every draw.

python -m benchmarks.evaluation_cost --json=benchmarks/results/evaluation_cost_cpu.json

Drawn faces and a new network of gdl128's kind, the cheapest of 128x128, beside which scores cost most: neither what is
drawn nor what was learnt changes the time.
"""

import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.environment import environment
from configs import gdl128
from facevae_jax import command_line, startup
from facevae_jax.config import RunConfig
from facevae_jax.data.pixels import open_splits
from facevae_jax.errors import expand_home
from facevae_jax.files import write_json
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.metrics import scores
from facevae_jax.training.restore import RestoredModel
from facevae_jax.training.sharding import make_mesh
from facevae_jax.training.state import create_state, make_model, make_optimizer


def define_flags() -> None:
    """Defines the flags; not at import, so that a test may import this module."""
    flags.DEFINE_integer("images", 10_000, "that are evaluated", lower_bound=1)
    flags.DEFINE_integer("rounds", 2, "of taking turns", lower_bound=1)
    flags.DEFINE_string("json", None, "file to write")


def make_trained(module: Any, images: int, folder: str) -> TrainedVAE:
    """A new network, and drawn faces to evaluate it on, in a folder."""
    settings = module.get_config()
    with settings.unlocked():
        settings.data.update(name="synthetic", data_dir=folder)
        settings.data.update(synthetic_train_images=1, synthetic_validation_images=images)
    config = RunConfig.from_config_dict(settings)
    state = create_state(config, make_model(config), make_optimizer(config.train, total_steps=1), make_mesh())
    moments = state.latent_moments.replace(images=np.float32(images))
    variance = state.decoder_variance.replace(total=np.float32(0.01), weight=np.float32(1))
    restored = RestoredModel(config, make_model(config), state.evaluation_variables, moments, variance, step=0)
    return TrainedVAE(restored, folder=expand_home(folder, name="folder"))


def forward_passes(trained: TrainedVAE, pixels: np.ndarray) -> float:
    """Seconds of encoding all images, decoding two latents of each, and decoding the draws of the bound."""
    inference, size = trained.inference, trained.inference.batch_size
    started = time.perf_counter()
    batches = (np.asarray(pixels[at : at + size]) for at in range(0, len(pixels), size))
    means = np.concatenate([part.mean for part in inference.encode_stream(batches)])
    draws = min(scores.BOUND_IMAGES, len(pixels)) * scores.DRAWS[-1]
    for count in (2 * len(pixels), draws):
        latents = np.resize(means, (count, means.shape[1]))
        for decoded in inference.map_stream(_decode, (latents[at : at + size] for at in range(0, count, size))):
            del decoded
    return time.perf_counter() - started


def _decode(model: Any, variables: Any, latents: Any) -> Any:
    """The mean of each image: fetching pixels is not part of the pass, but computing them is."""
    return jnp.mean(model.apply(variables, latents, method="decode"), axis=(1, 2, 3))


def measure(module: Any, *, images: int, rounds: int) -> dict[str, Any]:
    """Both in turns, after a first time that compiles them."""
    with tempfile.TemporaryDirectory() as folder:
        trained = make_trained(module, images, folder)
        pixels = open_splits(trained.config.data).evaluation
        seconds: dict[str, list[float]] = {"forward_passes": [], "evaluation": []}
        for number in range(rounds + 1):
            passes = forward_passes(trained, pixels)
            started = time.perf_counter()
            scores.evaluate(trained, draws=scores.DRAWS, priors=("standard", "gaussian"))
            whole = time.perf_counter() - started
            if number:
                seconds["forward_passes"].append(passes)
                seconds["evaluation"].append(whole)
        jax.clear_caches()
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {"seconds": seconds, "ratios": ratios, "ratio": statistics.median(ratios)}


def main(arguments: list[str]) -> None:
    """Measures gdl128."""
    del arguments
    values = flags.FLAGS
    startup.keep_compiled_programs()
    record: dict[str, Any] = {"what": __doc__, "images": values.images, "draws": scores.DRAWS[-1]}
    record["gdl128"] = measure(gdl128, images=values.images, rounds=values.rounds)
    print(f"an evaluation takes {record['gdl128']['ratio']:.2f} of its forward passes", flush=True)
    if values.json:
        write_json(values.json, record | {"environment": environment()})


if __name__ == "__main__":
    define_flags()
    startup.use_huge_pages()
    command_line.run(main)
