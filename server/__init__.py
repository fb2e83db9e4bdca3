"""The coordinator's program for one run: Flower's ServerApp, and the experiments that it ships."""
