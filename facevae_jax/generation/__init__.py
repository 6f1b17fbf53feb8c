"""Makes faces with a trained model: what the commands after training share."""
