"""Methods: what is learned, and how it changes what the model computes."""
