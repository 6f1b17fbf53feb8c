"""Shared by all other packages: errors, files, hosts, progress, random streams."""
