"""A page in the browser to explore a trained model with: what `python -m facevae_jax.explore` serves."""
