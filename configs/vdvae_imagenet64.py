"""ImageNet at 64x64 by a Very Deep VAE.

The network and its optimizer as published by Child 2021 ("Very deep VAEs generalize autoregressive models and can
outperform them on images"), in 125,005,860 parameters. Updates are skipped by the running norm of
the gradient, not by a fixed one.

Command: python -m facevae_jax.main --config=configs/vdvae_imagenet64.py --workdir=/tmp/vdvae_imagenet64
Hardware, time and score: not yet measured. Published: 32 V100 for 2.5 weeks: 3.52 bits/dim.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import hierarchical

DIMENSIONS = 64 * 64 * 3  # the published loss, and with it the clipped norm, is divided by them


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="imagenet64", resolution=64),
        model=hierarchical.Config(
            encoder_blocks="64x11,64d2,32x20,32d2,16x9,16d2,8x8,8d2,4x7,4d4,1x5",
            decoder_blocks="1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16,32x31,64m32,64x12",
            width=512,
            bottleneck=0.25,
            latent_channels=16,
            bias_up_to=64,
            pixel_mean=115.92961967,
            pixel_deviation=69.37404,
        ),
        objective=ObjectiveConfig(likelihood="color_logistic", mixture_components=10),
        train=TrainConfig(
            optimizer="adamw",
            batch_size=128,
            steps=1_600_000,
            learning_rate=1.5e-4,
            beta2=0.9,
            weight_decay=0.01,
            warmup_steps=100,
            clip_norm=220 * DIMENSIONS,
            skip_factor=4.0,  # published: above 380 * DIMENSIONS
            ema_decay=0.999,
        ),
    ).to_config_dict()
