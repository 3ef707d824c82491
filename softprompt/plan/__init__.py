"""A plan: what a training step needs on hardware that need not be here, before any weights are."""
