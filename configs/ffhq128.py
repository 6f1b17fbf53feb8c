"""FFHQ at 128x128, prepared by `python -m facevae_jax.prepare --layout=ffhq --resolution=128 --source=DIR`.

Command: python -m facevae_jax.main --config=configs/ffhq128.py --workdir=/tmp/ffhq128
Hardware, time and score: not yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="ffhq", resolution=128, flip=True),
        objective=ObjectiveConfig(likelihood="gaussian"),
        train=TrainConfig(batch_size=128, epochs=30, learning_rate=2e-3, schedule="cosine", warmup_steps=200),
    ).to_config_dict()
