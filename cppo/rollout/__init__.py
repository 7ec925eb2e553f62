"""Rollouts: the protocol of an engine, which samples responses, and the engines."""
