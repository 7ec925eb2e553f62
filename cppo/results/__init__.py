"""What a run leaves behind: its folder, checkpoints, provenance, and the tables made of it."""
