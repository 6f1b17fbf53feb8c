"""The paper's model in pythae, trained by its own `BaseTrainer`.

Encoder and decoder are the layers of `torch_vae`; the loss is pythae's, half the summed squared error + KL, which
costs the same as r_loss_factor x MSE + KL. Nothing is tuned: pythae knows neither torch.compile nor channels-last.
"""

import logging
import os
import tempfile
import time
from importlib import metadata
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # read as tqdm is imported: a progress bar is not training

import torch
from pythae.data.datasets import BaseDataset, DatasetOutput
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback

from benchmarks.peers import torch_vae
from benchmarks.peers.case import ADAM_EPSILON, Case, Timing, fixed_batch, whole_epochs
from facevae_jax.config import CHANNELS, RunConfig


class Encoder(BaseEncoder):
    """The encoder of `torch_vae` as pythae wants it."""

    def __init__(self, network: torch_vae.Network) -> None:
        """Takes the layers from the network."""
        super().__init__()
        self.layers, self.mean, self.log_variance = network.encoder, network.mean, network.log_variance

    def forward(self, x: torch.Tensor) -> ModelOutput:
        """Images in [0, 1] to the posterior."""
        x = self.layers(x)
        return ModelOutput(embedding=self.mean(x), log_covariance=self.log_variance(x))


class Decoder(BaseDecoder):
    """The decoder of `torch_vae` as pythae wants it."""

    def __init__(self, network: torch_vae.Network) -> None:
        """Takes the layers from the network."""
        super().__init__()
        self.layers = network.decoder

    def forward(self, z: torch.Tensor) -> ModelOutput:
        """Latents to images in [0, 1]."""
        return ModelOutput(reconstruction=self.layers(z))


class Repeated(BaseDataset):
    """The images of one batch, so many times: epochs of any length, without the memory for them."""

    def __init__(self, images: torch.Tensor, *, times: int) -> None:
        """Takes images float32 [b, 3, r, r]."""
        super().__init__(images, torch.ones(len(images)))
        self.times = times

    def __len__(self) -> int:
        return self.times * len(self.data)

    def __getitem__(self, index: int) -> DatasetOutput:
        return super().__getitem__(index % len(self.data))


class Clock(TrainingCallback):
    """From the first epoch's begin to the last one's end."""

    started = ended = 0.0

    def on_epoch_begin(self, training_config: BaseTrainerConfig, **options: Any) -> None:
        """Called by pythae."""
        self.started = self.started or time.perf_counter()

    def on_epoch_end(self, training_config: BaseTrainerConfig, **options: Any) -> None:
        """Called by pythae, which has fetched the loss of every step by then."""
        self.ended = time.perf_counter()


class Trainer(BaseTrainer):
    """pythae's trainer, which leaves no files behind."""

    def save_model(self, model: Any, dir_path: str) -> None:
        """Saves nothing; it would be called once, after the last epoch."""


def make_case(config: RunConfig, variant: str) -> Case:
    """pythae's VAE and trainer as they are; there are no variants."""
    del variant
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    network = torch_vae.make_network(config)
    resolution, batch_size = config.data.resolution, config.train.batch_size
    model = VAE(
        VAEConfig(input_dim=(CHANNELS, resolution, resolution), latent_dim=config.model.latent_dim),
        encoder=Encoder(network),
        decoder=Decoder(network),
    )
    images = torch.from_numpy(fixed_batch(config)).permute(0, 3, 1, 2).contiguous().float() / 255.0

    def train(steps: int) -> Timing:
        epochs, epoch_steps = whole_epochs(steps)
        clock = Clock()
        with tempfile.TemporaryDirectory() as directory:
            options = BaseTrainerConfig(
                output_dir=directory,
                per_device_train_batch_size=batch_size,
                num_epochs=epochs,
                learning_rate=config.train.learning_rate,
                optimizer_cls="Adam",
                optimizer_params={"eps": ADAM_EPSILON},
            )
            trainer = Trainer(model, Repeated(images, times=epoch_steps), training_config=options, callbacks=[clock])
            trainer.train()
        return Timing(epochs * epoch_steps * batch_size, clock.ended - clock.started)

    versions = {name: metadata.version(name) for name in ("pythae", "torch")}
    return Case(train, torch_vae.trainable_parameters(model), torch_vae.device_name(), versions)
