"""Compiles a run for accelerators that are not there, and reads in the compiled program what it needs and does."""
