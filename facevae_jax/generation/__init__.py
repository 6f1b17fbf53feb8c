"""From a trained model to faces: what the commands after training share."""
