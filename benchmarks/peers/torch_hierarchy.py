"""A hierarchical VAE's training in PyTorch, for the comparison of training speed.

The network of `models.hierarchical` without patches, by the published names of its tensors, so that
`exporting.published.vdvae_parameters` makes the same network of them here. Convolutions and products are PyTorch's own.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import case
from benchmarks.peers.torch_vae import trained_case
from facevae_jax.config import RunConfig
from facevae_jax.core.settings import CHANNELS
from facevae_jax.models.hierarchical import NO_NEIGHBORS, Config

Groups = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]  # means and log deviations: q, then p


class Block(nn.Module):
    """1x1, 3x3, 3x3, 1x1 convolutions, each of an activation."""

    def __init__(self, config: Config, inputs: int, resolution: int, outputs: int, *, blocks: int = 1) -> None:
        """`blocks` is the number of residual blocks whose sum is kept from growing."""
        super().__init__()
        inside, size = config.inside(resolution), 1 if resolution <= NO_NEIGHBORS else 3
        self.c1 = nn.Conv2d(inputs, inside, 1)
        self.c2, self.c3 = (nn.Conv2d(inside, inside, size, padding=size // 2) for _ in range(2))
        self.c4 = nn.Conv2d(inside, outputs, 1)
        self.c4.weight.data /= math.sqrt(blocks)
        self.active = {"gelu": functional.gelu, "silu": functional.silu}[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of [b, inputs, h, w]."""
        for layer in (self.c1, self.c2, self.c3, self.c4):
            x = layer(self.active(x))
        return x


class Encoder(nn.Module):
    """Pixels to the features of each resolution."""

    def __init__(self, config: Config) -> None:
        """Makes the blocks."""
        super().__init__()
        self.config, blocks = config, sum(level.blocks for level in config.encoder)
        self.in_conv = nn.Conv2d(CHANNELS, config.width_of(config.encoder[0].resolution), 3, padding=1)
        self.enc_blocks = nn.ModuleList(
            Block(config, width, level.resolution, width, blocks=blocks)
            for level in config.encoder
            for width in [config.width_of(level.resolution)] * level.blocks
        )

    def forward(self, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        """Of pixels from 0 to 255, [b, 3, r, r]."""
        x = self.in_conv((pixels - self.config.pixel_mean) / self.config.pixel_deviation)
        seen, number = {x.shape[2]: x}, 0
        for level in self.config.encoder:
            for _ in range(level.blocks):
                x, number = x + self.enc_blocks[number](x), number + 1
            if level.factor:
                x = functional.avg_pool2d(x, level.factor)
                x = functional.pad(x, (0, 0, 0, 0, 0, self.config.width_of(x.shape[2]) - x.shape[1]))
            seen[x.shape[2]] = x
        return seen


class TopDown(nn.Module):
    """A group of latents."""

    def __init__(self, config: Config, resolution: int) -> None:
        """Makes the blocks."""
        super().__init__()
        width, self.config, blocks = config.width_of(resolution), config, len(config.groups)
        self.enc = Block(config, 2 * width, resolution, 2 * config.latent_channels)
        self.prior = Block(config, width, resolution, 2 * config.latent_channels + width)
        nn.init.zeros_(self.prior.c4.weight)
        self.z_proj = nn.Conv2d(config.latent_channels, width, 1)
        self.z_proj.weight.data /= math.sqrt(blocks)
        self.resnet = Block(config, width, resolution, width, blocks=blocks)

    def log_deviation(self, raw: torch.Tensor) -> torch.Tensor:
        """Of what a block gives."""
        if self.config.deviation == "exp":
            return raw
        return torch.log(functional.softplus(raw, beta=math.log(2.0)))

    def forward(self, x: torch.Tensor, seen: torch.Tensor, groups: Groups) -> torch.Tensor:
        """The features below; adds to `groups`."""
        z = self.config.latent_channels
        mean, deviation = self.enc(torch.cat([x, seen], 1)).chunk(2, 1)
        prior_mean, prior_deviation, more = self.prior(x).split([z, z, x.shape[1]], 1)
        deviation, prior_deviation = self.log_deviation(deviation), self.log_deviation(prior_deviation)
        groups.append((mean, deviation, prior_mean, prior_deviation))
        x = x + more + self.z_proj(mean + torch.exp(deviation) * torch.randn_like(mean))
        return x + self.resnet(x)


class Decoder(nn.Module):
    """Groups of latents from the top down, then the numbers of the likelihood for each pixel."""

    def __init__(self, config: Config, outputs: int) -> None:
        """Makes the blocks."""
        super().__init__()
        self.config = config
        resolutions = sorted({level.resolution for level in config.decoder})
        sizes = [(1, config.width_of(r), r, r) for r in resolutions if r <= config.bias_up_to]
        self.bias_xs = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)
        self.dec_blocks = nn.ModuleList(TopDown(config, shape[0]) for shape in config.groups)
        width = config.width_of(config.decoder[-1].resolution)
        self.gain, self.bias = (nn.Parameter(torch.full((1, width, 1, 1), value)) for value in (1.0, 0.0))
        self.out_net = nn.ModuleDict({"out_conv": nn.Conv2d(width, outputs, 1)})

    def forward(self, seen: dict[int, torch.Tensor]) -> tuple[torch.Tensor, Groups]:
        """The raw output [b, outputs, r, r] and the groups."""
        config, batch = self.config, next(iter(seen.values())).shape[0]
        states = {bias.shape[2]: bias.expand(batch, -1, -1, -1) for bias in self.bias_xs}
        groups: Groups = []
        for level in config.decoder:
            resolution = level.resolution
            width = config.width_of(resolution)
            x = states.get(resolution, seen[resolution].new_zeros(batch, width, resolution, resolution))
            if level.above:
                x = x + functional.interpolate(states[level.above][:, :width], scale_factor=resolution // level.above)
            for _ in range(level.blocks):
                x = self.dec_blocks[len(groups)](x, seen[resolution], groups)
            states[resolution] = x
        return self.out_net["out_conv"](x * self.gain + self.bias), groups


class Network(nn.Module):
    """Images to raw output and groups."""

    def __init__(self, config: RunConfig) -> None:
        """Makes encoder and decoder."""
        super().__init__()
        self.components = config.objective.mixture_components
        self.encoder, self.decoder = Encoder(config.model), Decoder(config.model, 10 * self.components)

    def negative_elbo(self, pixels: torch.Tensor, kl_weight: float = 1.0) -> torch.Tensor:
        """Nats, the mean over images [b, 3, r, r] with pixels from 0 to 255; of another objective with a weight."""
        raw, groups = self.decoder(self.encoder(pixels))
        kl: torch.Tensor = torch.zeros(())
        for mean, deviation, prior_mean, prior_deviation in groups:
            squares = torch.exp(2 * deviation) + (mean - prior_mean).square()
            each = prior_deviation - deviation - 0.5 + 0.5 * squares / torch.exp(2 * prior_deviation)
            kl = kl + each.flatten(1).sum(1)
        return (kl_weight * kl - self.log_probability(pixels / 127.5 - 1.0, raw)).mean()

    def log_probability(self, x: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """Of pixels from -1 to 1 under a mixture of discretized logistics (Salimans et al. 2017, eq. 2 and 3)."""
        k = self.components
        log_weights = torch.log_softmax(raw[:, :k], 1)
        means, log_scales, coefficients = (
            raw[:, k:].unflatten(1, (CHANNELS, 3, k)).unbind(2)  # [b, color, component, h, w] each
        )
        log_scales, c = log_scales.clamp(-7.0, 7.0), torch.tanh(coefficients)
        red, green = x[:, 0:1], x[:, 1:2]
        means = torch.stack(
            [means[:, 0], means[:, 1] + c[:, 0] * red, means[:, 2] + c[:, 1] * red + c[:, 2] * green], 1
        )
        distance, inverse = x[:, :, None] - means, torch.exp(-log_scales)
        above, below = inverse * (distance + 1 / 255), inverse * (distance - 1 / 255)
        x = x[:, :, None]
        left = torch.where(x > 1 - 1 / 255, 0.0, functional.logsigmoid(above))
        right = torch.where(x < 1 / 255 - 1, 0.0, functional.logsigmoid(-below))
        width = torch.log(-torch.expm1(-2 / 255 * inverse))
        of_colors = left + right + torch.where((x > 1 / 255 - 1) & (x < 1 - 1 / 255), width, 0.0)
        return torch.logsumexp(log_weights + of_colors.sum(1), 1).flatten(1).sum(1)


def make_case(config: RunConfig, variant: str) -> case.Case:
    """One of the variants in `worker.HIERARCHY_PEERS`, on the CUDA device if there is one."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if "channels-last" in variant else torch.contiguous_format
    network = Network(config).to(device, memory_format=layout)
    pixels = torch.from_numpy(case.fixed_batch(config)).permute(0, 3, 1, 2).to(device).contiguous(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.train.learning_rate, fused=True)
    loss_of = torch.compile(network.negative_elbo) if "compile" in variant else network.negative_elbo
    return trained_case(network, optimizer, lambda: loss_of(pixels.float()))
