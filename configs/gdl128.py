"""The paper's lineage, exactly: the VAE of Foster's *Generative Deep Learning*, with the paper's batch and epochs.

Command: python -m facevae_jax.main --config=configs/gdl128.py --workdir=/tmp/gdl128
         (on CelebA: --config.data.name=celeba)
Hardware, time and score: one core of an AMD EPYC, 100 minutes (81 images/s) on 16,000 images of CelebA; on 2,000
validation images MSE 0.0137, KL 51.0 nats; total in training 198.6: docs/evaluation.md.
"""

import ml_collections

from facevae_jax.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from facevae_jax.models import vae


def get_config() -> ml_collections.ConfigDict:
    """The run's settings."""
    return RunConfig(
        data=DataConfig(name="ffhq", resolution=128),
        model=vae.Config(
            latent_dim=200,
            filters=(32, 64, 64, 64),
            head="transposed",
            normalization="batch",
            batch_norm_momentum=0.99,
            activation="leaky_relu",
            dropout_rate=0.25,
        ),
        objective=ObjectiveConfig(likelihood="mse", r_loss_factor=10_000.0, kl_weight=1.0),
        train=TrainConfig(batch_size=150, epochs=30, learning_rate=5e-4, schedule="constant", warmup_steps=0),
    ).to_config_dict()
