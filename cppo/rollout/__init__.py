"""Rollouts: one protocol, and the engines that sample."""
