"""The paper's lineage, exactly: the VAE of Foster's *Generative Deep Learning*, with the paper's batch and epochs.

Command: python -m facevae_jax.main --config=configs/gdl128.py --workdir=/tmp/gdl128
         (on CelebA: --config.data.name=celeba)
Hardware, time and score: not yet measured.
"""

import ml_collections

from facevae_jax.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="ffhq", resolution=128),
        model=ModelConfig(
            latent_dim=200,
            filters=(32, 64, 64, 64),
            normalization="batch",
            batch_norm_momentum=0.99,
            activation="leaky_relu",
            dropout_rate=0.25,
        ),
        objective=ObjectiveConfig(likelihood="mse", r_loss_factor=10_000.0, kl_weight=1.0),
        train=TrainConfig(batch_size=150, epochs=30, learning_rate=5e-4, schedule="constant", warmup_steps=0),
    ).to_config_dict()
