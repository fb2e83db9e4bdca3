"""What only the coordinator of a study does: provision kits, fence the server, run it."""
