"""Causal language models: created, loaded, and asked for log-probabilities."""
