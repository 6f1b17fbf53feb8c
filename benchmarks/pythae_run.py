"""Trains pythae's VAE by pythae's own trainer on a prepared dataset, and converts it to a model for our evaluation.

    pip install -e ".[bench]"
    python -m benchmarks.pythae_run --name=celeba --resolution=64 --epochs=15 --output=/tmp/pythae
    python -m facevae_jax.evaluate --workdir=/tmp/pythae/model.safetensors

The network is the lineage's without dropout, as in the comparison of speed (see `benchmarks.peers.torch_vae`), batch
150 and Adam 5e-4 as in `configs/gdl128.py`; the loss is pythae's own, half the summed squared error + KL. PyTorch pads
before a strided convolution where ours pads after it, so it trains on faces rotated by 180 degrees: with kernels
rotated back, its parameters are those of our network for upright faces.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import gdl128
from facevae_jax.config import RunConfig
from facevae_jax.core import command_line
from facevae_jax.core.errors import expand_home, make_writable_directory
from facevae_jax.core.files import atomic_writer, write_json
from facevae_jax.data.dataset import open_dataset
from facevae_jax.trained import weights
from facevae_jax.trained.model import Restored, TrainedModel
from facevae_jax.training.setup import RunningMean, make_mesh


def evaluated_config(name: str, resolution: int) -> RunConfig:
    """pythae's model as our config: r_loss_factor is half the number of values in an image."""
    settings = gdl128.get_config()
    with settings.unlocked():
        settings.data.name, settings.data.resolution = name, resolution
        settings.model.dropout_rate = 0.0
        settings.objective.r_loss_factor = 3 * resolution**2 / 2
    return RunConfig.from_config_dict(settings)


def converted(network: Any) -> dict[str, Any]:
    """A `torch_vae.Network`'s parameters and statistics as those of our VAE for images rotated by 180 degrees."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}

    def dense(name: str) -> dict[str, Any]:
        return {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}

    def rotated(flat: np.ndarray) -> np.ndarray:
        """Values [..., channels x side x side] of a grid, rotated, in the order of channels-last ones."""
        grid = flat.reshape(*flat.shape[:-1], *network.grid)[..., ::-1, ::-1]
        return np.moveaxis(grid, -3, -1).reshape(flat.shape)

    heads = {name: dense(name) for name in ("mean", "log_variance")}
    for head in heads.values():
        head["kernel"] = rotated(head["kernel"].T).T
    params: dict[str, Any] = {"encoder": heads, "decoder": {"Dense_0": jax.tree.map(rotated, dense("decoder.0"))}}
    statistics: dict[str, Any] = {"encoder": {}, "decoder": {}}
    for part, kind, first in (("encoder", "StridedConvolution", 0), ("decoder", "TransposedConvolution", 2)):
        for index, at in enumerate(range(first, len(getattr(network, part)) - 1, 3)):  # convolution, norm, activation
            kernel = arrays[f"{part}.{at}.weight"][:, :, ::-1, ::-1].transpose(2, 3, 1, 0)
            params[part][f"{kind}_{index}"] = {"kernel": kernel, "bias": arrays[f"{part}.{at}.bias"]}
            norm = f"{part}.{at + 1}"
            if f"{norm}.running_mean" in arrays:
                affine = {"scale": arrays[f"{norm}.weight"], "bias": arrays[f"{norm}.bias"]}
                moments = {name: arrays[f"{norm}.running_{name}"] for name in ("mean", "var")}
                params[part][f"Stage_{index}"] = {"BatchNorm_0": affine}
                statistics[part][f"Stage_{index}"] = {"BatchNorm_0": moments}
    return {"params": params, "batch_stats": statistics}


def train(config: RunConfig, epochs: int) -> tuple[Any, float]:
    """Returns the trained network and the seconds of its epochs."""
    import torch

    from benchmarks.peers import pythae_vae, torch_vae

    torch.manual_seed(0)
    pixels = open_dataset(config.data).images("train")[:, ::-1, ::-1].transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255.0
    network = torch_vae.Network(config)
    seconds = pythae_vae.train_epochs(network, pythae_vae.Images(images), config, epochs=epochs)
    return network.eval(), seconds


def main(arguments: list[str]) -> None:
    """Trains, converts, and writes `model.safetensors` and `training.json`."""
    del arguments
    values = flags.FLAGS
    output = make_writable_directory(expand_home(values.output, name="--output"), name="--output")
    config = evaluated_config(values.name, values.resolution)
    network, seconds = train(config, values.epochs)
    zero = RunningMean(jnp.zeros(()), jnp.zeros(()))
    restored = Restored(config, jax.tree.map(jnp.asarray, converted(network)), zero, step=values.epochs)
    moments = TrainedModel(restored, folder=output, mesh=make_mesh()).moments
    with atomic_writer(output / weights.FILE) as file:
        file.write(weights.serialize(restored._replace(moments=moments)))
    figures = {"epochs": values.epochs, "training_seconds": seconds}
    write_json(output / "training.json", figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    flags.DEFINE_string("name", "celeba", "of the prepared dataset")
    flags.DEFINE_integer("resolution", 64, "pixels along one side")
    flags.DEFINE_integer("epochs", 15, "of training", lower_bound=1)
    flags.DEFINE_string("output", None, "directory to write", required=True)
    command_line.run(main)
