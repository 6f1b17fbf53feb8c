"""CelebA at 64x64, prepared by `python -m facevae_jax.prepare --layout=celeba --resolution=64 --source=DIR`.

Command: python -m facevae_jax.main --config=configs/celeba64.py --workdir=/tmp/celeba64
Hardware, time and score: not yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, RunConfig, TrainConfig


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="celeba", resolution=64),
        train=TrainConfig(batch_size=128, epochs=20, learning_rate=2e-3, schedule="cosine", warmup_steps=200),
    ).to_config_dict()
