"""How good a trained model is: reconstruction, likelihood, latents, and samples against real faces.

python -m facevae_jax.evaluate --workdir=/tmp/quickstart

A table on the screen, and all figures as JSON in the workdir. --diagnose says why samples are poor: what the decoder
and what the prior contributes to their distance from real faces. --importance_samples=1,10,100,1000,5000 tightens the
bound on the likelihood; --features=package.module:function compares samples with real faces by any network's features,
and --fid by Inception's (extra `fid`).
"""

from typing import Any

from absl import flags

from facevae_jax.core import command_line, startup
from facevae_jax.core.errors import expand_home, writable_file
from facevae_jax.latents.priors import PRIORS, STANDARD

flags.DEFINE_string("workdir", None, "Directory of the run, or of an exported model.")
_SPLIT = flags.DEFINE_enum("split", None, ["train", "validation", "test"], "Which images; as the run by default.")
_JSON = flags.DEFINE_string("json", None, "File to write; WORKDIR/evaluation_SPLIT.json by default.")
flags.DEFINE_list("importance_samples", ["1", "10", "100"], "Draws of the bound; empty for no bound.")
_IMPORTANCE_IMAGES = flags.DEFINE_integer("importance_images", 256, "Images that it is computed for.", lower_bound=1)
_RECALIBRATE = flags.DEFINE_boolean("recalibrate", False, "Recompute batch normalization's statistics without dropout.")
_PRIOR = flags.DEFINE_enum("prior", None, list(PRIORS), "What samples are drawn from; as sample by default.")
_SAMPLES = flags.DEFINE_integer("samples", 10_000, "Images of each set that is compared, at most.", lower_bound=2)
_TEMPERATURE = flags.DEFINE(
    command_line.TemperatureParser(), "temperature", 1.0, "Of the samples that are compared; as sample takes it."
)
_FEATURES = flags.DEFINE_string("features", None, "package.module:function, from uint8 images to rows of features.")
_DIAGNOSE = flags.DEFINE_boolean("diagnose", False, "Split the samples' distance into its causes.")
_FID = flags.DEFINE_boolean("fid", False, "FID and KID of samples and reconstructions by torch-fidelity.")
_WEIGHTS = flags.DEFINE_string("inception_weights", None, "Its weights, where it cannot download them.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", lower_bound=0, upper_bound=2**32 - 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Images at a time; 0: what suits the resolution.", lower_bound=0)


def main(arguments: list[str]) -> None:
    """Evaluates, prints and writes."""
    workdir, draws = command_line.workdir_of(arguments), command_line.numbers("importance_samples", int)

    from facevae_jax.core.files import write_json  # after the flags are checked: jax takes seconds to import
    from facevae_jax.metrics import (
        comparison,
        diagnosis,
        frechet,
        inception,
        likelihood,
        recalibration,
        scores,
        spectrum,
    )
    from facevae_jax.metrics import protocol as protocols
    from facevae_jax.trained.loading import folder_of, restore
    from facevae_jax.trained.model import TrainedModel
    from facevae_jax.training.setup import make_mesh

    if draws:
        likelihood.check_draws(draws)
    weights = expand_home(_WEIGHTS.value, name="--inception_weights") if _WEIGHTS.value else None
    if weights:
        inception.check_weights(weights)
    extract = frechet.named_extractor(_FEATURES.value) if _FEATURES.value else None
    startup.keep_compiled_programs()
    mesh = make_mesh()
    restored = restore(workdir, mesh)
    if _RECALIBRATE.value:
        restored = recalibration.recalibrated(restored)
    trained = TrainedModel(restored, folder=folder_of(workdir), mesh=mesh, batch_size=_BATCH_SIZE.value)
    split = _SPLIT.value or trained.dataset.evaluation_split
    output = expand_home(_JSON.value or str(trained.folder / f"evaluation_{split}.json"), name="--json")
    writable_file(output, name="--json")
    prior = _PRIOR.value or trained.default_prior
    if _FID.value:
        inception.check_installed()
    trained.sampler(prior, temperature=_TEMPERATURE.value)  # fitted, or refused, before hours of work
    features = extract or diagnosis.layout_and_detail
    features_name = protocols.named_features(
        _FEATURES.value or features.__name__, features, resolution=trained.resolution
    )  # called once, so that a missing package is found now
    priors: list[Any] = list(dict.fromkeys([STANDARD, prior]))
    record = scores.evaluate(trained, split, draws=draws, bound_images=_IMPORTANCE_IMAGES.value, priors=priors)
    drawn: dict[str, Any] = {"prior": prior, "temperature": _TEMPERATURE.value, "seed": _SEED.value}
    record["checkerboard"] = spectrum.checkerboards(trained, split, **drawn)
    compared = drawn | {"count": _SAMPLES.value}

    def protocol(features: str, images: int) -> dict[str, Any]:
        return {"protocol": protocols.protocol(trained, split=split, count=images, features=features, **drawn)}

    if extract:
        found = comparison.sample_distances(trained, split, extract=extract, **compared)
        record["features"] = {"function": _FEATURES.value, **found, **protocol(features_name, found["images"])}
    if _FID.value:
        found = comparison.inception_distances(trained, split, weights=weights, **compared)
        record["inception"] = found | protocol(found["extractor"], found["images"])
    if _DIAGNOSE.value:
        found = diagnosis.diagnose(trained, split, extract=features, **compared)
        record["diagnosis"] = found | protocol(features_name, found["images"])
    write_json(output, {"recalibrated": _RECALIBRATE.value, **record})
    print(scores.table(record))
    print(output)


if __name__ == "__main__":
    command_line.run(main)
