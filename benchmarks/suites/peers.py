"""Training speed beside PyTorch, Keras and pythae, in one run: the paper's model without dropout on one fixed batch.

Every case is a process of its own, and they take turns, so that a change in the machine's load meets all of them.
"""

import dataclasses
import os
import statistics
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.peers import client
from benchmarks.peers.client import Worker, WorkerError
from benchmarks.peers.worker import PEERS
from configs import gdl128
from facevae_jax import startup
from facevae_jax.config import RunConfig

if TYPE_CHECKING:
    from benchmarks.suites.options import Options

START_SECONDS = 1200.0  # for a worker to compile and warm up; max-autotune tries many kernels
TURN_FACTOR, TURN_SECONDS = 20.0, 120.0  # a turn may last TURN_FACTOR x as long as was aimed at, + TURN_SECONDS
OURS = "ours"


def run(options: "Options") -> dict[str, Any]:
    """Times every peer that runs here; `options.config` gives resolution, batch, latent dimensions and dtype."""
    config = peer_config(options.config)
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    rates: dict[str, list[float]] = {}
    ready: dict[str, dict[str, Any]] = {}
    try:
        for name in PEERS:
            try:
                workers[name] = Worker(client.worker_command(name, config), time_limit=START_SECONDS)
            except WorkerError as error:
                skip(name, error, skipped)
        ready = {name: worker.ready for name, worker in workers.items()}
        rates = {name: [] for name in workers}
        for _ in range(options.rounds):
            for name in list(workers):
                try:
                    rates[name].append(turn(workers[name], options.seconds))
                except WorkerError as error:
                    skip(name, error, skipped)
                    del workers[name], rates[name], ready[name]
    finally:
        for worker in workers.values():
            worker.close()
    return summarise(config, rates, ready=ready, skipped=skipped)


def peer_config(config: RunConfig) -> RunConfig:
    """`configs/gdl128.py` without dropout, as the peers build it, at the size and speed settings of `config`."""
    preset = RunConfig.from_config_dict(gdl128.get_config())
    train = {name: getattr(config.train, name) for name in ("batch_size", "steps_per_dispatch", "convolution")}
    model = {name: getattr(config.model, name) for name in ("latent_dim", "dtype")}
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, resolution=config.data.resolution),
        model=dataclasses.replace(preset.model, dropout_rate=0.0, **model),
        train=dataclasses.replace(preset.train, **train),
    )


def turn(worker: Worker, seconds: float) -> float:
    """Images per second of one turn of about `seconds`."""
    steps = max(1, round(seconds / worker.ready["seconds_per_step"]))
    timing = worker.train(steps, time_limit=TURN_FACTOR * seconds + TURN_SECONDS)
    return timing["images"] / timing["seconds"]


def skip(name: str, error: WorkerError, skipped: dict[str, str]) -> None:
    """Notes why a peer does not take part."""
    skipped[name] = str(error)
    print(f"peers: {name} is skipped: {error}", file=sys.stderr)


def summarise(
    config: RunConfig, rates: dict[str, list[float]], *, ready: dict[str, dict[str, Any]], skipped: dict[str, str]
) -> dict[str, Any]:
    """The record, with our speed as a multiple of the peers'."""
    median = {name: statistics.median(values) for name, values in rates.items()}
    # bfloat16 is less work, so it competes only where ours computes in it too.
    torch = {
        name: rate
        for name, rate in median.items()
        if name.startswith("torch ") and (config.model.dtype == "bfloat16" or "bf16" not in name)
    }
    keras = {name: rate for name, rate in median.items() if name.startswith("keras ")}
    best_torch = max(torch, key=torch.__getitem__, default=None)
    best_keras = max(keras, key=keras.__getitem__, default=None)
    versions: dict[str, str] = {}
    for name, answer in ready.items():
        if name != OURS:
            versions |= answer["versions"]
    huge = "ours asks for huge pages, as its command does, and the others run as they come"
    if startup.HUGE_PAGES in os.environ.get(startup.TUNABLES, ""):
        huge = "all with huge pages"
    return {
        "what": f"training steps of gdl128 without dropout, ours in {config.model.dtype}, "
        f"{config.data.resolution}x{config.data.resolution}, batch {config.train.batch_size}, latent dimensions "
        f"{config.model.latent_dim}, on one fixed batch; {huge}; images per second",
        "median": median,
        "all": rates,
        "ratio_to_best_torch": ratio(median, best_torch),
        "ratio_to_best_torch_per_round": ratios(rates, best_torch),
        "best_torch": best_torch,
        "ratio_to_pythae": ratio(median, "pythae"),
        "ratio_to_keras_fit": ratio(median, best_keras),
        "best_keras_fit": best_keras,
        "skipped": skipped,
        "peers": versions,
        "devices": {name: answer["device"] for name, answer in ready.items()},
        "trainable_parameters": {name: answer["parameters"] for name, answer in ready.items()},
    }


def ratio(median: dict[str, float], peer: str | None) -> float | None:
    """Our speed over a peer's; None where one of them did not run."""
    if peer not in median or OURS not in median:
        return None
    return median[OURS] / median[peer]


def ratios(rates: dict[str, list[float]], peer: str | None) -> list[float] | None:
    """`ratio` in each round: neighbours in time, so that the machine's noise shows."""
    if peer not in rates or OURS not in rates:
        return None
    return [ours / theirs for ours, theirs in zip(rates[OURS], rates[peer], strict=True)]
