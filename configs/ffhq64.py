"""FFHQ at 64x64, prepared by `python -m facevae_jax.prepare --layout=ffhq --resolution=64 --source=DIR`.

Command: python -m facevae_jax.main --config=configs/ffhq64.py --workdir=/tmp/ffhq64
Hardware, time and score: not yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="ffhq", resolution=64, flip=True),
        objective=ObjectiveConfig(likelihood="gaussian"),
        train=TrainConfig(batch_size=128, epochs=30, learning_rate=2e-3, schedule="cosine", warmup_steps=200),
    ).to_config_dict()
