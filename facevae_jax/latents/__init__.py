"""Latent space: priors to draw from."""
