"""CelebA at 64x64 with a spatial latent: a KL-regularized autoencoder, an 8x8 grid of 8 channels.

Prepared by `python -m facevae_jax.prepare --layout=celeba --resolution=64 --source=DIR`.

Command: python -m facevae_jax.main --config=configs/celeba64_spatial.py --workdir=/tmp/celeba64_spatial
Hardware, time and score: one core of an AMD EPYC beside other work, 10 minutes of that core (184 images/s) on 16,000
images; on 2,000 validation images MSE 0.0028, KL 1,253 nats, -ELBO -17,348 nats. GPU: not yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import autoencoder


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="celeba", resolution=64, flip=True),
        model=autoencoder.Config(downsampling=8, latent_channels=8, width=64, blocks=1),
        objective=ObjectiveConfig(likelihood="gaussian"),
        train=TrainConfig(batch_size=64, epochs=8, learning_rate=1e-3, schedule="cosine", warmup_steps=200),
    ).to_config_dict()
