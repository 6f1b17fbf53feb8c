"""CelebA at 64x64 by the compact network of Efficient-VDVAE.

Depths, widths, latents, likelihood and optimizer as published by Hazami et al. 2022 ("Efficient-VDVAE: less is more"),
celebA64_compact. Connections are those of Child 2021: blocks of a resolution see the same activations of the encoder,
where there each sees its own through a 1x1 convolution; features of other widths are cut, or padded with zeros.

Prepared by
`python -m facevae_jax.prepare --layout=celeba --crop=15,40,163,188 --resize=bilinear --resolution=64 --source=DIR`.

Command: python -m facevae_jax.main --config=configs/evdvae_celeba64_compact.py --workdir=/tmp/evdvae_celeba64_compact
Hardware, time and score: not yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import hierarchical


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="celeba", resolution=64, flip=True),
        model=hierarchical.Config(
            encoder_blocks="64x11,64d2,32x8,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x2",
            decoder_blocks="1x2,4m1,4x3,8m4,8x6,16m8,16x10,32m16,32x15,64m32,64x21",
            width=512,
            widths="64:32,32:64,16:128,8:256",
            bottleneck_widths="64:32,32:32",
            latent_channels=32,
            activation="silu",
            deviation="softplus",
        ),
        objective=ObjectiveConfig(likelihood="color_logistic", mixture_components=10, kl_warmup_steps=5000),
        train=TrainConfig(
            optimizer="adamax",
            batch_size=16,
            steps=800_000,
            learning_rate=1e-3,
            schedule="cosine",  # published: to 1e-4, from step 50,000 to 750,000
            warmup_steps=100,
            skip_factor=4.0,  # published: above a norm of 800
            ema_decay=0.9999,
        ),
    ).to_config_dict()
