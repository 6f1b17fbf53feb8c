"""Faces that the project draws itself."""
