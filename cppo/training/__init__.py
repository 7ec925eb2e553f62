"""Training: rollouts into batches, batches into updates, and the base model that a run begins from."""
