"""Variational autoencoders of human faces in JAX and Flax."""

__version__ = "0.1.0"
