"""Drawn faces at 64x64: a first model in a few minutes on a laptop's CPU, with nothing to download.

Command: python -m facevae_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart
Hardware, time and score: 2 cores of an AMD EPYC, 2 minutes (980 images/s; 550 to 650 on a Xeon); on 1,024 validation
faces MSE 0.0020, KL 82.8 nats, loss 477.4.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import vae


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="synthetic", resolution=64),
        model=vae.Config(latent_dim=32, filters=(32, 64, 128, 256), activation="silu"),
        objective=ObjectiveConfig(likelihood="mse", r_loss_factor=200_000.0),
        train=TrainConfig(
            batch_size=16,
            epochs=10,
            learning_rate=6e-3,
            schedule="cosine",
            warmup_steps=512,
            log_every_steps=512,
            evaluate_every_epochs=2,
        ),
    ).to_config_dict()
