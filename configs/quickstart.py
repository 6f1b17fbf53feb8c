"""Drawn faces at 64x64: a first model in a few minutes on a laptop's CPU, with nothing to download.

Command: python -m facevae_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart
Hardware, time and score: not yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="synthetic", resolution=64),
        model=ModelConfig(latent_dim=64, filters=(32, 64, 64, 64)),
        objective=ObjectiveConfig(likelihood="mse", r_loss_factor=10_000.0),
        train=TrainConfig(batch_size=128, epochs=8, learning_rate=1e-3, schedule="cosine", warmup_steps=100),
    ).to_config_dict()
