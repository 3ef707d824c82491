"""Serving: one base model with many prompts, over HTTP."""
