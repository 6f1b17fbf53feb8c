"""CIFAR-10 at 32x32 by a Very Deep VAE.

The network and its optimizer as published by Child 2021 ("Very deep VAEs generalize autoregressive models and can
outperform them on images"), in 39,145,700 parameters. Updates are skipped by the running norm of
the gradient, not by a fixed one.

Command: python -m facevae_jax.main --config=configs/vdvae_cifar10.py --workdir=/tmp/vdvae_cifar10
Hardware, time and score: not yet measured. Published: 2 V100: 2.87 bits/dim.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import hierarchical

DIMENSIONS = 32 * 32 * 3  # the published loss, and with it the clipped norm, is divided by them


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="cifar10", resolution=32),
        model=hierarchical.Config(
            encoder_blocks="32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
            decoder_blocks="1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21",
            width=384,
            bottleneck=0.25,
            latent_channels=16,
            bias_up_to=64,
            pixel_mean=120.63838,
            pixel_deviation=64.16736,
        ),
        objective=ObjectiveConfig(likelihood="color_logistic", mixture_components=10),
        train=TrainConfig(
            optimizer="adamw",
            batch_size=32,
            steps=1_000_000,
            learning_rate=2e-4,
            beta2=0.9,
            weight_decay=0.01,
            warmup_steps=100,
            clip_norm=200 * DIMENSIONS,
            skip_factor=4.0,  # published: above 400 * DIMENSIONS
            ema_decay=0.9999,
        ),
    ).to_config_dict()
