"""Task families: problems with answers that a machine can check."""
