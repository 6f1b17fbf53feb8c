"""Training speed beside PyTorch, Keras and pythae, in one run: the paper's model without dropout on one fixed batch.

Of a config with a hierarchy it is that hierarchy, beside PyTorch.

Every case is a process of its own, and they take turns, so that a change of the machine's load affects all of them.
"""

import dataclasses
import os
from typing import Any

from benchmarks.peers.worker import HIERARCHY_PEERS, PEERS, Worker, WorkerError
from benchmarks.suites.timing import Options, medians
from configs import gdl128
from facevae_jax.config import RunConfig
from facevae_jax.core import startup

START_SECONDS = 1200.0  # for a worker to compile and warm up
TURN_FACTOR, TURN_SECONDS = 20.0, 120.0  # a turn may last TURN_FACTOR x as long as aimed at, + TURN_SECONDS


def run(options: Options) -> dict[str, Any]:
    """Times every peer that runs here; `options.config` sets resolution, batch and latent dimensions."""
    hierarchy = options.config.model.kind == "hierarchical"
    config = options.config if hierarchy else peer_config(options.config)
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    rates: dict[str, list[float]] = {}
    limit = TURN_FACTOR * options.seconds + TURN_SECONDS
    try:
        for name, peer in (HIERARCHY_PEERS if hierarchy else PEERS).items():
            try:
                workers[name] = Worker(peer, config, time_limit=START_SECONDS)
                rates[name] = []
            except WorkerError as error:
                skipped[name] = str(error)
        for _ in range(options.rounds):
            for name, worker in list(workers.items()):
                steps = max(1, round(options.seconds / worker.ready["seconds_per_step"]))
                try:
                    rates[name].append(steps * config.train.batch_size / worker.train(steps, time_limit=limit))
                except WorkerError as error:
                    skipped[name] = str(error)
                    del workers[name], rates[name]
    finally:
        for worker in workers.values():
            worker.close()
    huge = "ours asks for huge pages, as its command does, and the others run as they come"
    if startup.HUGE_PAGES in os.environ.get(startup.TUNABLES, ""):
        huge = "all with huge pages"
    network = f"gdl128 without dropout, latent dimensions {getattr(config.model, 'latent_dim', 0)}"
    network = f"the hierarchy {config.model.decoder_blocks}" if hierarchy else network
    ready = {name: worker.ready for name, worker in workers.items()}
    return {
        "what": f"training steps of {network}, ours in float32, {config.data.resolution}x{config.data.resolution}, "
        f"batch {config.train.batch_size}, on one fixed batch; {huge}; images per second",
        "median": medians(rates),
        "all": rates,
        "skipped": skipped,
        "peers": {key: value for answer in ready.values() for key, value in answer["versions"].items()},
        "devices": {name: answer["device"] for name, answer in ready.items()},
        "trainable_parameters": {name: answer["parameters"] for name, answer in ready.items()},
    }


def peer_config(config: RunConfig) -> RunConfig:
    """`configs/gdl128.py` without dropout, as the peers build it, at the size and speed settings of `config`."""
    preset = RunConfig.from_config_dict(gdl128.get_config())
    train = {name: getattr(config.train, name) for name in ("batch_size", "steps_per_dispatch", "convolution")}
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, resolution=config.data.resolution),
        model=dataclasses.replace(preset.model, dropout_rate=0.0, latent_dim=config.model.latent_dim),
        train=dataclasses.replace(preset.train, **train),
    )
