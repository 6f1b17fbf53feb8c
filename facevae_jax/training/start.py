"""What a run starts from: its images, and the newest checkpoint or a fresh state."""

import pathlib
import time

import jax

from facevae_jax import models
from facevae_jax.core import hosts
from facevae_jax.data.dataset import Dataset
from facevae_jax.training import workdir as workdirs
from facevae_jax.training.checkpoints import Checkpoints, Restored
from facevae_jax.training.setup import TrainSetup, abstract_state, create_state, parameter_count, replicated
from facevae_jax.training.telemetry import log
from facevae_jax.training.watchdog import Watchdog


def check_data(workdir: pathlib.Path, dataset: Dataset, *, accept_new: bool) -> bool:
    """`workdirs.check_data`, which one process does for all."""
    return hosts.is_main() and workdirs.check_data(workdir, dataset, accept_new=accept_new)


def opened(dataset: Dataset) -> Dataset:
    """The dataset, with the pixel stores that training reads."""
    if dataset.evaluation_split == "train":
        count = dataset.sizes.get("validation", 0)
        log(f"{count} validation images are too few to judge by: the evaluations are of the training images")
    for split in ("train", dataset.evaluation_split):
        dataset.images(split)
    return dataset


def start_state(setup: TrainSetup, dataset: Dataset, checkpoints: Checkpoints, watchdog: Watchdog) -> Restored:
    """The state of the newest whole checkpoint, or a fresh one; of a kind that is fitted, the fitted one."""
    devices = jax.devices()
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    log(f"devices: {len(devices)} x {devices[0].device_kind}{processes}")
    restored = checkpoints.restore_newest(abstract_state(setup))
    if restored is not None:
        log(f"resuming from step {int(restored.state.step):,}")
        return restored
    state = create_state(setup)
    log(f"model: {parameter_count(state):,} parameters, counting batch statistics")
    fit = models.fit_of(setup.config.model.kind)
    if fit is None:
        return Restored(state, evaluated=True)
    started = time.perf_counter()
    images = dataset.images("train")
    params = hosts.together(lambda: fit(setup.config.model, images, progress=watchdog.heartbeat))
    params = hosts.of_main(params)
    log(f"fitted to {dataset.sizes['train']:,} images in {time.perf_counter() - started:.1f} s")
    params = jax.device_put(params, replicated(setup.mesh))
    return Restored(state._replace(params=params, step=state.step + 1), evaluated=False)
