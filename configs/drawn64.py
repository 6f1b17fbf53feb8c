"""Drawn faces at 64x64, long enough that most attributes are in the latents: what editing is measured on.

Command: python -m facevae_jax.main --config=configs/drawn64.py --workdir=/tmp/drawn64
Hardware, time and score: 2 cores of an AMD EPYC, 27 minutes (410 images/s); validation MSE 0.00108, KL 97.8 nats. What
edits do: docs/generation.md.
"""

import ml_collections

from facevae_jax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="synthetic", resolution=64, synthetic_train_images=16_384),
        model=ModelConfig(latent_dim=64, filters=(32, 64, 128, 256)),
        objective=ObjectiveConfig(likelihood="mse", r_loss_factor=150_000.0),
        train=TrainConfig(
            batch_size=64,
            epochs=40,
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=256,
            log_every_steps=200,
            evaluate_every_epochs=8,
        ),
    ).to_config_dict()
