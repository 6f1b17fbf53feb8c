"""One HTML page about a run: curves, faces, the latent space and scores."""
