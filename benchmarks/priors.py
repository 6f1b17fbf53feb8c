"""Compares the priors of a run: distance of their samples from faces, speed, and whether wanted labels are met.

python -m benchmarks.priors --workdir=/tmp/celeba64 --features=benchmarks.face_features:attributes \
    --wanted=Smiling,Male,Eyeglasses,Blond_Hair --json=benchmarks/results/priors_celeba64.json

The labels are read by the network of `benchmarks.face_features`, which has never seen the model. Speed and
hatching are those of the last prior; speed is that of whole batches from a seed to pixels in the host's memory, against
the decoder alone, in turns.
"""

import itertools
import statistics
import time
from typing import Any

import numpy as np
from absl import flags

from benchmarks.environment import environment
from benchmarks.face_features import attribute_logits
from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import UserError, expand_home, writable_file
from facevae_jax.core.files import write_json
from facevae_jax.latents.priors import PRIORS
from facevae_jax.metrics.frechet import features_of, frechet_distance, named_extractor
from facevae_jax.metrics.protocol import named_features, protocol
from facevae_jax.metrics.spectrum import checkerboards
from facevae_jax.trained.codes import image_blocks
from facevae_jax.trained.loading import load
from facevae_jax.trained.model import TrainedModel

flags.DEFINE_string("workdir", None, "Directory of the run.")
_FEATURES = flags.DEFINE_string("features", "benchmarks.face_features:attributes", "package.module:function.")
_PRIORS = flags.DEFINE_list("priors", list(PRIORS), "Which priors.")
_TEMPERATURES = flags.DEFINE_multi(
    command_line.TemperatureParser(), None, "temperature", [1.0], "Of samples; may be given several times."
)
_COUNT = flags.DEFINE_integer("count", 2_000, "Images of each set.", lower_bound=2)
_SEEDS = flags.DEFINE_integer("seeds", 2, "Sets of samples of each prior.", lower_bound=1)
_WANTED = flags.DEFINE_list("wanted", [], "Binary labels that are asked for, one at a time.")
_SPEED = flags.DEFINE_integer("speed_count", 4_096, "Images of one timing; 0: none.", lower_bound=0)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File to write.")


def distances(trained: TrainedModel, *, split: str, count: int, seeds: int) -> dict[str, Any]:
    """Fréchet distances to the split, of other faces, of their reconstructions and of samples."""
    extract, size = named_extractor(_FEATURES.value), trained.inference.batch_size
    real = features_of(extract, image_blocks(trained.dataset.images(split)[:count], size))
    others = trained.dataset.images("train")[:count]

    def of(batches: Any) -> float:
        return frechet_distance(features_of(extract, batches), real)

    features = named_features(_FEATURES.value, extract, resolution=trained.resolution)
    samples = []
    for prior, temperature in itertools.product(_PRIORS.value, _TEMPERATURES.value):
        drawn: dict[str, Any] = {"prior": prior, "temperature": temperature}
        found = [of(trained.sample_stream(count, seed=seed, **drawn)) for seed in range(seeds)]
        said = protocol(trained, split=split, count=count, seed=0, features=features, **drawn)
        samples.append({"distances": found, "protocol": said})
    return {
        "other_faces": of(image_blocks(others, size)),
        "their_reconstructions": of(map(trained.reconstruct, image_blocks(others, size))),
        "samples": samples,
    }


def labels_met(trained: TrainedModel, wanted: list[str], *, count: int) -> dict[str, float]:
    """The share of samples in which the network reads the label that was asked for, half with and half without."""
    names = [attribute.name for attribute in trained.dataset.attributes]
    found = {}
    for name in wanted:
        met = []
        for value in (0, 1):
            faces = trained.sample(count // 2, prior=trained.prior_given([f"{name}={value}"]))
            met.append(float(np.mean((attribute_logits(faces)[:, names.index(name)] > 0) == value)))
        found[name] = statistics.mean(met)
        found[f"{name}=0"], found[f"{name}=1"] = met
    return found


def speed(trained: TrainedModel, prior: str, *, count: int, rounds: int) -> dict[str, Any]:
    """Images a second of samples and of the decoder alone, in turns."""
    size = trained.inference.batch_size
    codes = np.tile(trained.sample_codes(size, prior="gaussian"), (-(-count // size), 1))[:count]
    cases = {
        "sampling": lambda: trained.sample_stream(count, prior=prior),
        "decoding": lambda: trained.inference.decode_stream(trained.inference.batches(codes)),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):  # the first compiles
        for name, case in cases.items():
            began = time.perf_counter()
            for _ in case():
                pass
            if turn:
                rates[name].append(count / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(rates["sampling"], rates["decoding"], strict=True)]
    return {"prior": prior, "images": count, "images_per_second": rates, "ratio_median": statistics.median(ratios)}


def main(arguments: list[str]) -> None:
    """Measures, prints and writes."""
    workdir = command_line.workdir_of(arguments)
    if wrong := [name for name in _PRIORS.value if name not in PRIORS]:
        raise UserError(f"--priors={wrong[0]!r} is not one of {', '.join(PRIORS)}.")
    output = expand_home(_JSON.value, name="--json") if _JSON.value else None
    if output:
        writable_file(output, name="--json")
    startup.keep_compiled_programs()
    trained = load(workdir)
    split = trained.dataset.evaluation_split
    began = time.perf_counter()
    for prior in _PRIORS.value:
        trained.prior(prior)
    record: dict[str, Any] = {
        "what": "priors of one run; distances in the features' units",
        "step": trained.step,
        "config": trained.config.to_dict(),
        "seconds_to_fit_or_read_the_priors": time.perf_counter() - began,
        "distances": distances(trained, split=split, count=_COUNT.value, seeds=_SEEDS.value),
        "checkerboard": checkerboards(trained, split, prior=_PRIORS.value[-1], seed=0),
    }
    if _WANTED.value:
        record["labels_met"] = labels_met(trained, _WANTED.value, count=_COUNT.value)
    if _SPEED.value:
        record["speed"] = speed(trained, _PRIORS.value[-1], count=_SPEED.value, rounds=_ROUNDS.value)
    print({key: value for key, value in record.items() if key != "config"})
    if output:
        write_json(output, record | environment())


if __name__ == "__main__":
    command_line.run(main)
