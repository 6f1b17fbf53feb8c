"""A trained model and what is fitted to it."""
