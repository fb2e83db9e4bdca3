"""The ClientApp of plain Flower."""
