"""How datasets lie in their folders: images, splits, labels."""
