"""pythae's VAE, trained by pythae's own trainer on a prepared dataset, as a model that our evaluator takes.

    pip install -e ".[bench]"
    python -m benchmarks.pythae_run --name=celeba --resolution=64 --epochs=15 --output=/tmp/pythae
    python -m facevae_jax.evaluate --workdir=/tmp/pythae/model.safetensors

The network is the lineage's without dropout, as in the comparison of speed (see `benchmarks.peers.torch_vae`), batch
150 and Adam 5e-4 as in `configs/gdl128.py`; the loss is pythae's own, half the summed squared error + KL. PyTorch pads
before a strided convolution where ours pads after it, so it is trained on faces turned by 180 degrees: turned back, its
parameters are those of our network for upright ones.
"""

import json
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import gdl128
from facevae_jax import command_line
from facevae_jax.config import RunConfig
from facevae_jax.data.pixels import open_splits
from facevae_jax.errors import expand_home, make_writable_directory
from facevae_jax.exporting import weights
from facevae_jax.files import atomic_writer, write_json
from facevae_jax.generation import latent_tables
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.latents.priors import LatentMoments
from facevae_jax.training.restore import RestoredModel
from facevae_jax.training.state import DecoderVariance, make_model


def define_flags() -> None:
    """Defines the flags; not at import, so that a test may import this module."""
    flags.DEFINE_string("name", "celeba", "of the prepared dataset")
    flags.DEFINE_integer("resolution", 64, "pixels along one side")
    flags.DEFINE_integer("epochs", 15, "of training", lower_bound=1)
    flags.DEFINE_string("output", None, "directory to write", required=True)


def evaluated_config(name: str, resolution: int) -> RunConfig:
    """What pythae trains, in our words: r_loss_factor = D / 2."""
    settings = gdl128.get_config()
    with settings.unlocked():
        settings.data.name, settings.data.resolution = name, resolution
        settings.model.dropout_rate = 0.0
        settings.objective.r_loss_factor = 3 * resolution**2 / 2
    return RunConfig.from_config_dict(settings)


def converted(network: Any) -> dict[str, Any]:
    """Parameters and statistics of a `torch_vae.Network` as those of our VAE for images turned by 180 degrees."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
    latent_dim, (channels, side, _) = len(arrays["mean.bias"]), network.grid

    def convolution(prefix: str) -> dict[str, Any]:
        kernel = arrays[f"{prefix}.weight"][:, :, ::-1, ::-1]
        return {"kernel": kernel.transpose(2, 3, 1, 0), "bias": arrays[f"{prefix}.bias"]}

    def head(name: str) -> dict[str, Any]:
        turned = arrays[f"{name}.weight"].reshape(latent_dim, channels, side, side)[:, :, ::-1, ::-1]
        return {"kernel": turned.transpose(2, 3, 1, 0).reshape(-1, latent_dim), "bias": arrays[f"{name}.bias"]}

    params: dict[str, Any] = {"encoder": {name: head(name) for name in ("mean", "log_variance")}, "decoder": {}}
    statistics: dict[str, Any] = {"encoder": {}, "decoder": {}}
    turned = arrays["decoder.0.weight"].reshape(channels, side, side, latent_dim)[:, ::-1, ::-1]
    bias = arrays["decoder.0.bias"].reshape(channels, side, side)[:, ::-1, ::-1].transpose(1, 2, 0).ravel()
    params["decoder"]["Dense_0"] = {"kernel": turned.transpose(3, 1, 2, 0).reshape(latent_dim, -1), "bias": bias}
    for part, kind, first in (("encoder", "StridedConvolution", 0), ("decoder", "TransposedConvolution", 2)):
        index = 0
        while f"{part}.{first + 3 * index}.weight" in arrays:  # convolution, normalisation, activation
            at = first + 3 * index
            params[part][f"{kind}_{index}"] = convolution(f"{part}.{at}")
            if f"{part}.{at + 1}.running_mean" in arrays:
                affine = {"scale": arrays[f"{part}.{at + 1}.weight"], "bias": arrays[f"{part}.{at + 1}.bias"]}
                moments = {name: arrays[f"{part}.{at + 1}.running_{name}"] for name in ("mean", "var")}
                params[part][f"Stage_{index}"] = {"BatchNorm_0": affine}
                statistics[part][f"Stage_{index}"] = {"BatchNorm_0": moments}
            index += 1
    return {"params": params, "batch_stats": statistics}


def train(config: RunConfig, epochs: int) -> tuple[Any, float]:
    """The trained network and the seconds from the first epoch's begin to the last one's end."""
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.trainers import BaseTrainerConfig

    from benchmarks.peers import pythae_vae, torch_vae

    torch.manual_seed(0)
    pixels = np.asarray(open_splits(config.data).train)[:, ::-1, ::-1].transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255.0
    network = torch_vae.make_network(config)
    model = VAE(
        VAEConfig(input_dim=tuple(images.shape[1:]), latent_dim=config.model.latent_dim),
        encoder=pythae_vae.Encoder(network),
        decoder=pythae_vae.Decoder(network),
    )
    clock = pythae_vae.Clock()
    with tempfile.TemporaryDirectory() as directory:
        options = BaseTrainerConfig(
            output_dir=directory,
            per_device_train_batch_size=config.train.batch_size,
            num_epochs=epochs,
            learning_rate=config.train.learning_rate,
        )
        dataset = BaseDataset(images, torch.ones(len(images)))
        trainer = pythae_vae.Trainer(model, dataset, training_config=options, callbacks=[clock])
        trainer.train()
    return network.eval(), clock.ended - clock.started


def main(arguments: list[str]) -> None:
    """Trains, converts, and writes `model.safetensors` and `training.json`."""
    del arguments
    values = flags.FLAGS
    output = make_writable_directory(expand_home(values.output, name="--output"), name="--output")
    config = evaluated_config(values.name, values.resolution)
    network, seconds = train(config, values.epochs)
    zeros = DecoderVariance(jnp.zeros(()), jnp.zeros(()))
    moments = LatentMoments(jnp.zeros(()), jnp.zeros(config.model.latent_dim), jnp.eye(config.model.latent_dim))
    variables = jax.tree.map(jnp.asarray, converted(network))
    restored = RestoredModel(config, make_model(config), variables, moments, zeros, step=values.epochs)
    trained = TrainedVAE(restored, folder=output)
    posterior = latent_tables.encode_split(trained, latent_tables.evaluation_split(trained)).posterior
    moments = LatentMoments.of(*posterior)
    with atomic_writer(output / weights.FILE) as file:
        file.write(weights.serialize(restored._replace(latent_moments=moments)))
    write_json(output / "training.json", {"epochs": values.epochs, "training_seconds": seconds})
    print(json.dumps({"epochs": values.epochs, "training_seconds": seconds}))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
