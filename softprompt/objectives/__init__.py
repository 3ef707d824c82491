"""Objectives: what training minimizes, as pure functions of a model and a batch."""
