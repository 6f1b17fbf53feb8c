"""The paper's model, loss and optimiser in PyTorch, for the comparison of training speed.

The same network as `configs/gdl128.py` without dropout: four strided 3x3 convolutions, four transposed ones, batch
normalisation, LeakyReLU 0.3; r_loss_factor x MSE + KL; Adam. PyTorch pads both sides by one where TensorFlow's SAME
pads one side at stride 2: the same work and the same parameters, where a separate padding would cost PyTorch time.
"""

import math
import time
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.peers.case import (
    ADAM_EPSILON,
    BATCH_NORM_EPSILON,
    BATCH_NORM_MOMENTUM,
    FILTERS,
    LEAKY_RELU_SLOPE,
    Case,
    Timing,
    fixed_batch,
)
from facevae_jax.config import CHANNELS, RunConfig


class Variant(NamedTuple):
    """How the same training step is run."""

    channels_last: bool = False
    compile_mode: str | None = None  # of torch.compile; None: eager
    bfloat16: bool = False  # autocast, on a CUDA device


VARIANTS = {
    "eager": Variant(),
    "eager channels-last": Variant(channels_last=True),
    "compile": Variant(compile_mode="default"),
    "compile channels-last": Variant(channels_last=True, compile_mode="default"),
    "compile max-autotune channels-last bf16": Variant(channels_last=True, compile_mode="max-autotune", bfloat16=True),
}


class Network(nn.Module):
    """Images [b, 3, r, r] in [0, 1] to (reconstruction, mean, log variance)."""

    def __init__(self, *, resolution: int, latent_dim: int) -> None:
        """Makes the layers for one resolution."""
        super().__init__()
        channels = CHANNELS
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for filters in FILTERS:
            encoder += [nn.Conv2d(channels, filters, 3, stride=2, padding=1), *hidden(filters)]
            channels = filters
        side = resolution // 2 ** len(FILTERS)
        self.grid = (channels, side, side)
        for filters in FILTERS[-2::-1]:
            decoder += [transposed(channels, filters), *hidden(filters)]
            channels = filters
        size = math.prod(self.grid)
        self.encoder = nn.Sequential(*encoder, nn.Flatten())
        self.mean, self.log_variance = nn.Linear(size, latent_dim), nn.Linear(size, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, size),
            nn.Unflatten(1, self.grid),
            *decoder,
            transposed(channels, CHANNELS),
            nn.Sigmoid(),
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstructs from one draw of the posterior."""
        x = self.encoder(images)
        mean, log_variance = self.mean(x).float(), self.log_variance(x).float()  # bfloat16 under autocast
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(latents).float(), mean, log_variance


def hidden(filters: int) -> list[nn.Module]:
    """What follows a hidden convolution."""
    norm = nn.BatchNorm2d(filters, eps=BATCH_NORM_EPSILON, momentum=1 - BATCH_NORM_MOMENTUM)
    return [norm, nn.LeakyReLU(LEAKY_RELU_SLOPE)]


def transposed(channels: int, filters: int) -> nn.Module:
    """Doubles height and width."""
    return nn.ConvTranspose2d(channels, filters, 3, stride=2, padding=1, output_padding=1)


def loss_function(network: nn.Module, images: torch.Tensor, *, r_loss_factor: float) -> torch.Tensor:
    """r_loss_factor x MSE + KL, averaged over the batch."""
    reconstruction, mean, log_variance = network(images)
    kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
    return r_loss_factor * (reconstruction - images).square().mean() + kl


def make_network(config: RunConfig) -> Network:
    """The network for a config's resolution and latent dimensions."""
    return Network(resolution=config.data.resolution, latent_dim=config.model.latent_dim)


def trainable_parameters(network: nn.Module) -> int:
    """Numbers that the optimiser changes."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def device_name() -> str:
    """The device that torch would train on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def make_case(config: RunConfig, variant: str) -> Case:
    """One of `VARIANTS`, on the CUDA device where there is one.

    Raises:
      RuntimeError: the variant needs a CUDA device.
    """
    how = VARIANTS[variant]
    cuda = torch.cuda.is_available()
    if how.bfloat16 and not cuda:
        raise RuntimeError("needs a CUDA device")
    # What JAX does by default on a GPU, so that both multiply float32 as TensorFloat-32.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    device = torch.device("cuda" if cuda else "cpu")
    layout = torch.channels_last if how.channels_last else torch.contiguous_format
    network = make_network(config).to(device, memory_format=layout)
    pixels = torch.from_numpy(fixed_batch(config)).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.train.learning_rate, eps=ADAM_EPSILON, fused=True)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=how.bfloat16):
            return loss_function(network, pixels.float() / 255.0, r_loss_factor=config.objective.r_loss_factor)

    if how.compile_mode is not None:
        forward = torch.compile(forward, mode=how.compile_mode)

    def train(steps: int) -> Timing:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = forward(pixels)
            loss.backward()
            optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss became {loss.item()}")
        if cuda:
            torch.cuda.synchronize()
        return Timing(steps * len(pixels), time.perf_counter() - started)

    return Case(train, trainable_parameters(network), device_name(), {"torch": torch.__version__})
