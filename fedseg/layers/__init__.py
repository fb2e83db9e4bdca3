"""Blocks that several architectures share, one concept a file."""
