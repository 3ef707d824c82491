"""Experiment files: their schema, and reading them from YAML. Nothing here imports JAX."""
