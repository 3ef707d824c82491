"""Sweeps: many trials of one experiment that train side by side."""
