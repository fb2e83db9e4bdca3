"""Simulated differences between hospitals: other scanners, other geometry, other annotators."""
