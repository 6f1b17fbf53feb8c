"""Networks: convolutions and the variational autoencoder."""
