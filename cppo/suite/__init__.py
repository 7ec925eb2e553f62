"""Suites: their schema, how they are read from YAML, resolved and checked, and what they cost."""
