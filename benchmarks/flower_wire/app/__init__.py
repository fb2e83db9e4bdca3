"""A Flower app that sends weights to and fro."""
