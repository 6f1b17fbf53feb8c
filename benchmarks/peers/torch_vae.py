"""The paper's model, loss and optimizer in PyTorch, for the comparison of training speed.

The same network as `configs/gdl128.py` without dropout: four strided 3x3 convolutions, four transposed ones, batch
normalization, LeakyReLU 0.3; r_loss_factor x MSE + KL; Adam. PyTorch pads both sides by one where TensorFlow's SAME
pads one side at stride 2: the work and the parameters are the same, and a separate padding would cost PyTorch time.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.peers import case
from facevae_jax.config import RunConfig
from facevae_jax.core.settings import CHANNELS


class Network(nn.Module):
    """Images [b, 3, r, r] in [0, 1] to (reconstruction, mean, log variance)."""

    def __init__(self, config: RunConfig) -> None:
        """Makes the layers for the config's resolution and latent dimensions."""
        super().__init__()
        side, latent_dim, channels = config.data.resolution // 2 ** len(case.FILTERS), config.model.latent_dim, CHANNELS
        self.grid = (case.FILTERS[-1], side, side)
        size = math.prod(self.grid)
        encoder: list[nn.Module] = []
        for filters in case.FILTERS:
            encoder += [nn.Conv2d(channels, filters, 3, stride=2, padding=1), *hidden(filters)]
            channels = filters
        decoder: list[nn.Module] = [nn.Linear(latent_dim, size), nn.Unflatten(1, self.grid)]
        for filters in (*case.FILTERS[-2::-1], CHANNELS):
            decoder += [nn.ConvTranspose2d(channels, filters, 3, stride=2, padding=1, output_padding=1)]
            decoder += hidden(filters) if filters != CHANNELS else [nn.Sigmoid()]
            channels = filters
        self.encoder, self.decoder = nn.Sequential(*encoder, nn.Flatten()), nn.Sequential(*decoder)
        self.mean, self.log_variance = nn.Linear(size, latent_dim), nn.Linear(size, latent_dim)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstructs from one draw of the posterior."""
        x = self.encoder(images)
        mean, log_variance = self.mean(x), self.log_variance(x)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(latents), mean, log_variance


def hidden(filters: int) -> list[nn.Module]:
    """The layers after a hidden convolution."""
    norm = nn.BatchNorm2d(filters, eps=case.BATCH_NORM_EPSILON, momentum=1 - case.BATCH_NORM_MOMENTUM)
    return [norm, nn.LeakyReLU(case.LEAKY_RELU_SLOPE)]


def trainable_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def device_name() -> str:
    """The device that torch would train on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def make_case(config: RunConfig, variant: str) -> case.Case:
    """One of the variants in `worker.PEERS`, on the CUDA device if there is one."""
    cuda = torch.cuda.is_available()
    # JAX's default on a GPU, so that both multiply float32 as TensorFloat-32.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    device = torch.device("cuda" if cuda else "cpu")
    layout = torch.channels_last if "channels-last" in variant else torch.contiguous_format
    network = Network(config).to(device, memory_format=layout)
    pixels = torch.from_numpy(case.fixed_batch(config)).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.train.learning_rate, eps=case.ADAM_EPSILON, fused=True)

    def loss_of(pixels: torch.Tensor) -> torch.Tensor:
        """r_loss_factor x MSE + KL, averaged over the batch."""
        images = pixels.float() / 255.0
        reconstruction, mean, log_variance = network(images)
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        return config.objective.r_loss_factor * (reconstruction - images).square().mean() + kl

    loss_of = torch.compile(loss_of) if "compile" in variant else loss_of
    return trained_case(network, optimizer, lambda: loss_of(pixels))


def trained_case(
    network: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], torch.Tensor]
) -> case.Case:
    """A case whose steps minimize a loss of one batch."""

    def train(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss became {loss.item()}")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return case.Case(train, trainable_parameters(network), device_name(), {"torch": torch.__version__})
