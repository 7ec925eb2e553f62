"""Rollouts: one protocol for what samples responses, and the engines that do."""
