"""CelebA at 64x64 with a spatial latent: a KL-regularized autoencoder, an 8x8 grid of 8 channels.

Prepared by `python -m facevae_jax.prepare --layout=celeba --resolution=64 --source=DIR`.

Command: python -m facevae_jax.main --config=configs/celeba64_spatial.py --workdir=/tmp/celeba64_spatial
Hardware, time and score: 2 cores of an AMD EPYC, about 11 minutes (190 images/s, on a slow day) on 16,000 images; on
2,000 validation images MSE 0.0028, KL 1,242 nats, -ELBO -17,436 nats, measured with --config.model.head=patch. GPU: not
yet measured.
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
