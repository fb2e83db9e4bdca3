"""The gate at a hospital: Flower's ClientApp, small enough to read before one lets it in."""
