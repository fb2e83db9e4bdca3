"""A run for other programs' eyes: one `Writer` per program, fed from the run store."""
