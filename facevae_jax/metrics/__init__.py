"""How good a model is: reconstructions, likelihoods, latents, and samples against real faces."""
