"""Vectors in latent space: priors, paths, attribute directions."""
