"""Prepared datasets: written, read, verified."""
