"""CelebA at 64x64 by a hierarchical VAE for new faces: its latents up to 8x8 are the code, of which a flow is learned.

Prepared by `python -m facevae_jax.prepare --layout=celeba --resolution=64 --source=DIR`. `objective.kl_weights`
multiplies the KL of finer groups, so the code says nearly all of a face. Why: docs/hierarchical.md.

Command: python -m facevae_jax.main --config=configs/celeba64_deep_faces.py --workdir=/tmp/celeba64_deep_faces
Hardware, time and score: 32 minutes of one core of an AMD EPYC on 16,000 images (88 images/s alone on it), with
compiling, evaluations and the prior; on 2,000 validation images MSE 0.0027 and KL 719 nats. GPU: not yet measured.
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
            decoder_blocks="1x1,4m1,8m4,8x2,16m8,16x1,32m16",
            width=128,
            widths="32:64",
            bottleneck_widths="32:32",
            latent_channels=4,
            patch=2,
            activation="silu",
            deviation="softplus",
            code_resolution=8,
        ),
        objective=ObjectiveConfig(likelihood="gaussian", kl_weights="16:20,32:60"),
        train=TrainConfig(
            batch_size=8,
            epochs=9,
            learning_rate=2e-3,
            beta2=0.99,
            schedule="cosine",
            warmup_steps=200,
            skip_factor=4.0,
            ema_decay=0.999,
        ),
    ).to_config_dict()
