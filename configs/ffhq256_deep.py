"""FFHQ at 256x256 by a hierarchical VAE for accelerators: 35 groups of latents on patches of 2x2 pixels.

Prepared by `python -m facevae_jax.prepare --layout=ffhq --resolution=256 --source=DIR`. Widths are multiples of the 128
lanes of a TPU and of the tiles of a GPU's tensor cores, but for the 64 inside of blocks at 128x128.

Command: python -m facevae_jax.main --config=configs/ffhq256_deep.py --workdir=/tmp/ffhq256_deep
Hardware, time and score: not yet measured. For accelerators: docs/accelerators.md has plans.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import hierarchical


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="ffhq", resolution=256, flip=True),
        model=hierarchical.Config(
            encoder_blocks="128d2,64x3,64d2,32x3,32d2,16x3,16d2,8x2,8d2,4x2,4d4,1x2",
            decoder_blocks="1x2,4m1,4x2,8m4,8x4,16m8,16x7,32m16,32x8,64m32,64x5,128m64,128x1",
            width=512,
            widths="128:128,64:256",
            bottleneck_widths="128:64,64:128",
            patch=2,
            activation="silu",
            deviation="softplus",
        ),
        objective=ObjectiveConfig(likelihood="color_logistic", mixture_components=10, kl_warmup_steps=5000),
        train=TrainConfig(
            optimizer="adamax",
            batch_size=128,
            epochs=170,  # 10 million images
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=500,
            skip_factor=4.0,
            ema_decay=0.9995,
            evaluate_every_epochs=5,
        ),
    ).to_config_dict()
