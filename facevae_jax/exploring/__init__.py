"""The web page of `python -m facevae_jax.explore`: explores a trained model."""
