"""The paper's model in pythae, trained by its own `BaseTrainer`.

Encoder and decoder are the layers of `torch_vae`; the loss is pythae's, half the summed squared error + KL, which
costs the same as r_loss_factor x MSE + KL. pythae supports neither torch.compile nor channels-last.
"""

import logging
import tempfile
import time
from importlib import metadata
from typing import Any

import torch
from pythae.data.datasets import BaseDataset, DatasetOutput
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback

from benchmarks.peers import torch_vae
from benchmarks.peers.case import ADAM_EPSILON, Case, by_epochs, fixed_batch
from facevae_jax.config import RunConfig
from facevae_jax.core.settings import CHANNELS


class Encoder(BaseEncoder):
    """The encoder of `torch_vae` with pythae's interface."""

    def __init__(self, network: torch_vae.Network) -> None:
        """Takes the layers from the network."""
        super().__init__()
        self.layers, self.mean, self.log_variance = network.encoder, network.mean, network.log_variance

    def forward(self, x: torch.Tensor) -> ModelOutput:
        """Images in [0, 1] to the posterior."""
        x = self.layers(x)
        return ModelOutput(embedding=self.mean(x), log_covariance=self.log_variance(x))


class Decoder(BaseDecoder):
    """The decoder of `torch_vae` with pythae's interface."""

    def __init__(self, network: torch_vae.Network) -> None:
        """Takes the layers from the network."""
        super().__init__()
        self.layers = network.decoder

    def forward(self, z: torch.Tensor) -> ModelOutput:
        """Latents to images in [0, 1]."""
        return ModelOutput(reconstruction=self.layers(z))


class Images(BaseDataset):
    """Images, float32 [n, 3, r, r], repeated so many times without the memory for them."""

    def __init__(self, images: torch.Tensor, *, times: int = 1) -> None:
        """Without labels."""
        super().__init__(images, torch.ones(len(images)))
        self.times = times

    def __len__(self) -> int:
        return self.times * len(self.data)

    def __getitem__(self, index: int) -> DatasetOutput:
        return super().__getitem__(index % len(self.data))


class Clock(TrainingCallback):
    """Times from the start of the first epoch to the end of the last."""

    started = ended = 0.0

    def on_epoch_begin(self, training_config: BaseTrainerConfig, **options: Any) -> None:
        """Called by pythae."""
        self.started = self.started or time.perf_counter()

    def on_epoch_end(self, training_config: BaseTrainerConfig, **options: Any) -> None:
        """Called by pythae, after it has fetched the loss of every step."""
        self.ended = time.perf_counter()


class Trainer(BaseTrainer):
    """pythae's trainer without its checkpoint files."""

    def save_model(self, model: Any, dir_path: str) -> None:
        """Saves nothing; pythae calls it once, after the last epoch."""


def train_epochs(
    network: torch_vae.Network, images: Images, config: RunConfig, *, epochs: int, **options: Any
) -> float:
    """Trains the network as pythae's VAE by pythae's trainer, and returns the seconds of the epochs."""
    shape = (CHANNELS, config.data.resolution, config.data.resolution)
    settings = VAEConfig(input_dim=shape, latent_dim=config.model.latent_dim)
    model, clock = VAE(settings, encoder=Encoder(network), decoder=Decoder(network)), Clock()
    with tempfile.TemporaryDirectory() as directory:
        training = BaseTrainerConfig(
            output_dir=directory,
            per_device_train_batch_size=config.train.batch_size,
            num_epochs=epochs,
            learning_rate=config.train.learning_rate,
            **options,
        )
        Trainer(model, images, training_config=training, callbacks=[clock]).train()
    return clock.ended - clock.started


def make_case(config: RunConfig, variant: str) -> Case:
    """pythae's VAE and trainer as they are; there are no variants."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    network, adam = torch_vae.Network(config), {"eps": ADAM_EPSILON}
    images = torch.from_numpy(fixed_batch(config)).permute(0, 3, 1, 2).contiguous().float() / 255.0

    def train(epochs: int, epoch_steps: int) -> float:
        repeated = Images(images, times=epoch_steps)
        return train_epochs(network, repeated, config, epochs=epochs, optimizer_cls="Adam", optimizer_params=adam)

    versions = {name: metadata.version(name) for name in ("pythae", "torch")}
    return Case(by_epochs(train), torch_vae.trainable_parameters(network), torch_vae.device_name(), versions)
