"""CelebA at 64x64 by a hierarchical VAE that trains on a CPU: 12 groups of latents on patches of 2x2 pixels.

Prepared by `python -m facevae_jax.prepare --layout=celeba --resolution=64 --source=DIR`.

Command: python -m facevae_jax.main --config=configs/celeba64_deep.py --workdir=/tmp/celeba64_deep
Hardware, time and score: 57 minutes of one core of an AMD EPYC on 16,000 images (37 images/s), with compiling,
evaluations and the prior; on 2,000 validation images 3.40 bits/dim, MSE 0.0007 and KL 6,017 nats. On 2 cores of a Xeon,
17 images/s. Samples and what they need: docs/hierarchical.md. GPU: not yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import hierarchical


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="celeba", resolution=64, flip=True),
        model=hierarchical.Config(
            encoder_blocks="32d2,16x1,16d2,8x1,8d2,4x1,4d4,1x1",
            decoder_blocks="1x1,4m1,4x1,8m4,8x2,16m8,16x2,32m16,32x2",
            width=128,
            widths="32:64",
            bottleneck_widths="32:32",
            patch=2,
            activation="silu",
            deviation="softplus",
        ),
        objective=ObjectiveConfig(likelihood="color_logistic", mixture_components=3),
        train=TrainConfig(
            batch_size=8,
            epochs=7,
            learning_rate=2e-3,
            beta2=0.99,
            schedule="cosine",
            warmup_steps=200,
            skip_factor=4.0,
            ema_decay=0.999,
        ),
    ).to_config_dict()
