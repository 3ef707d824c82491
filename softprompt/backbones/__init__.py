"""Backbones: the networks of base models, and the files that they are loaded from."""
