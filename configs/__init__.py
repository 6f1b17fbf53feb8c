"""The configs of the project, by file name: `--config=ffhq128`. Installed as `facevae_jax.configs`."""
