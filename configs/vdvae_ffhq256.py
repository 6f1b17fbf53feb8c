"""FFHQ at 256x256 by a Very Deep VAE.

The network and its optimizer as published by Child 2021 ("Very deep VAEs generalize autoregressive models and can
outperform them on images"), in 114,874,852 parameters, for images of 5 bits a color as there. Updates are skipped by
the running norm of the gradient, not by a fixed one.

Command: python -m facevae_jax.main --config=configs/vdvae_ffhq256.py --workdir=/tmp/vdvae_ffhq256
Hardware, time and score: not yet measured. Published: 32 V100 for 2.5 weeks: 0.61 bits/dim at 5 bits.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import hierarchical

DIMENSIONS = 256 * 256 * 3  # the published loss, and with it the clipped norm, is divided by them


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="ffhq", resolution=256),
        model=hierarchical.Config(
            encoder_blocks="256x3,256d2,128x8,128d2,64x12,64d2,32x17,32d2,16x7,16d2,8x5,8d2,4x5,4d4,1x4",
            decoder_blocks=("1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x21,64m32,64x13,128m64,128x7,256m128"),
            width=512,
            bottleneck=0.25,
            latent_channels=16,
            bias_up_to=64,
            pixel_mean=112.8666757481,
            pixel_deviation=69.84780273,
        ),
        objective=ObjectiveConfig(likelihood="color_logistic", mixture_components=10, bits=5),
        train=TrainConfig(
            optimizer="adamw",
            batch_size=32,
            steps=1_700_000,
            learning_rate=1.5e-4,
            beta2=0.9,
            weight_decay=0.01,
            warmup_steps=100,
            clip_norm=130 * DIMENSIONS,
            skip_factor=4.0,  # published: above 180 * DIMENSIONS
            ema_decay=0.999,
        ),
    ).to_config_dict()
