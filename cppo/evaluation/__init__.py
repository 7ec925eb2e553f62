"""Scores of checkpoints, through lm-eval."""
