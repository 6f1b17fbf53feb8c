"""CelebA at 64x64, prepared by `python -m facevae_jax.prepare --layout=celeba --resolution=64 --source=DIR`.

Command: python -m facevae_jax.main --config=configs/celeba64.py --workdir=/tmp/celeba64
Hardware, time and score: 2 cores of an AMD EPYC, 14.5 minutes (580 images/s, on a slow day) on 16,000 images with
--config.train.evaluate_every_epochs=6; on 2,000 validation images MSE 0.0041, KL 567 nats, -ELBO -15,703 nats. Why
these settings: docs/evaluation.md. GPU: not yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="celeba", resolution=64, flip=True),
        objective=ObjectiveConfig(likelihood="gaussian"),
        train=TrainConfig(batch_size=64, epochs=30, learning_rate=2e-3, schedule="cosine", warmup_steps=200),
    ).to_config_dict()
