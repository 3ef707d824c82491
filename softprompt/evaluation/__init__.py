"""Evaluation: score candidates, and measure a model on examples."""
