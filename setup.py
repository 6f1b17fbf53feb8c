"""Installs configs/ as the package facevae_jax.configs, which pyproject.toml cannot express beside found packages."""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=["facevae_jax*"]), "facevae_jax.configs"],
    package_dir={"facevae_jax.configs": "configs"},
)
