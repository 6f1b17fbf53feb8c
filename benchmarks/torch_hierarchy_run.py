"""Trains a hierarchy in PyTorch on a prepared dataset for so much processor time, for our evaluation.

    pip install -e ".[bench]"
    python -m benchmarks.torch_hierarchy_run --config=configs/evdvae_celeba64_compact.py \\
        --core_minutes=240 --output=/tmp/t
    facevae-convert --from=vdvae --config=evdvae_celeba64_compact --checkpoint=/tmp/t/ema.th --output=/tmp/x
    facevae-evaluate --workdir=/tmp/x

The network is `benchmarks.peers.torch_hierarchy`, the optimizer Adamax with a cosine over the minutes. Minutes are
of processor time, so that other work on the machine takes nothing from them. The same command resumes an interrupted
run. `--channels_last` is PyTorch's other layout of images, which is faster on some machines.
"""

import json
import math
import time
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from facevae_jax.config import RunConfig
from facevae_jax.core import command_line
from facevae_jax.core.errors import expand_home, make_writable_directory
from facevae_jax.core.files import write_json
from facevae_jax.data.dataset import open_dataset

SAVE_SECONDS = 300.0
NORM_DECAY = 0.99  # of the running norm of the gradient, by which updates are skipped as `train.skip_factor` says


def main(arguments: list[str]) -> None:
    """Trains, and writes `ema.th`, the averaged weights, and `training.json`."""
    del arguments
    import torch

    from benchmarks.peers.torch_hierarchy import Network

    values = flags.FLAGS
    config = RunConfig.from_config_dict(values.config)
    output = make_writable_directory(expand_home(values.output, name="--output"), name="--output")
    torch.manual_seed(0)
    layout = torch.channels_last if values.channels_last else torch.contiguous_format
    network = Network(config).to(memory_format=layout)

    def average(averaged: Any, current: Any, updates: Any) -> Any:
        decay = min(config.train.ema_decay, (1.0 + int(updates)) / (10.0 + int(updates)))  # as in training/step.py
        return averaged + (current - averaged) * (1.0 - decay)

    ema = torch.optim.swa_utils.AveragedModel(network, avg_fn=average)
    optimizer = torch.optim.Adamax(network.parameters(), lr=config.train.learning_rate)
    counts: dict[str, Any] = {"steps": 0, "skipped": 0, "seconds": 0.0, "norm": 0.0}
    state = output / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for part, module in (("network", network), ("ema", ema), ("optimizer", optimizer)):
            module.load_state_dict(saved[part])
        counts = saved["counts"]
    images, budget, spent = open_dataset(config.data).images("train"), 60.0 * values.core_minutes, counts["seconds"]
    started, saved_at = time.process_time(), time.perf_counter()
    while counts["seconds"] < budget:
        drawn = np.random.default_rng([0, counts["steps"]])
        rows, mirrored = (drawn.integers(0, high, config.train.batch_size) for high in (len(images), 2))
        pairs = zip(rows, mirrored, strict=True)
        batch = np.stack([images[row][:, ::-1] if mirror else images[row] for row, mirror in pairs])
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float().contiguous(memory_format=layout)
        for group in optimizer.param_groups:
            group["lr"] = config.train.learning_rate * rate_factor(config, counts, budget)
        optimizer.zero_grad(set_to_none=True)
        loss = network.negative_elbo(pixels, kl_weight=min(1.0, (counts["steps"] + 1) / values.kl_warmup_steps))
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), math.inf))
        large = counts["norm"] and norm > config.train.skip_factor * counts["norm"]
        counts["steps"] += 1
        if math.isfinite(norm) and not large:
            optimizer.step()
            ema.update_parameters(network)
        else:
            counts["skipped"] += 1
        if math.isfinite(norm):
            limit = config.train.skip_factor * counts["norm"] or norm
            counts["norm"] = NORM_DECAY * (counts["norm"] or norm) + (1 - NORM_DECAY) * min(norm, limit)
        counts["seconds"] = spent + time.process_time() - started
        if counts["steps"] % 10 == 0:
            print(f"{counts['seconds']:,.0f} s  step {counts['steps']:,}  loss {float(loss):,.1f}", flush=True)
        if time.perf_counter() - saved_at > SAVE_SECONDS or counts["seconds"] >= budget:
            saved_at = time.perf_counter()
            parts = {"network": network, "ema": ema, "optimizer": optimizer}
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"counts": counts}, state)
            torch.save(ema.module.state_dict(), output / "ema.th")
    images_per_second = config.train.batch_size * counts["steps"] / counts["seconds"]
    record = {**counts, "batch_size": config.train.batch_size, "images_per_second": images_per_second}
    write_json(output / "training.json", record)
    print(json.dumps(record))


def rate_factor(config: RunConfig, counts: dict[str, Any], budget: float) -> float:
    """Of the learning rate: a linear warm-up over steps, then a cosine over the minutes."""
    warm = min(1.0, (counts["steps"] + 1) / max(config.train.warmup_steps, 1))
    return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, counts["seconds"] / budget)))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "the run's settings")
    flags.DEFINE_float("core_minutes", 240.0, "of training, summed over processor cores", lower_bound=0.0)
    flags.DEFINE_integer("kl_warmup_steps", 200, "over which the KL weight grows", lower_bound=1)
    flags.DEFINE_bool("channels_last", False, "PyTorch's layout of images")
    flags.DEFINE_string("output", None, "directory to write", required=True)
    command_line.run(main)
