"""CelebA at 64x64, prepared by `python -m facevae_jax.prepare --layout=celeba --resolution=64 --source=DIR`.

Command: python -m facevae_jax.main --config=configs/celeba64.py --workdir=/tmp/celeba64
Hardware, time and score: 2 cores of an AMD EPYC, 9.2 minutes with the learned prior (960 images/s) on 16,000 images; on
2,000 validation images MSE 0.0037, KL 687 nats, -ELBO -16,331 nats. Why these settings: docs/evaluation.md. GPU: not
yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import vae


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="celeba", resolution=64, flip=True),
        model=vae.Config(latent_dim=256),
        objective=ObjectiveConfig(likelihood="gaussian"),
        train=TrainConfig(batch_size=64, epochs=27, learning_rate=2e-3, schedule="cosine", warmup_steps=200),
    ).to_config_dict()
