"""Metrics of texts and labels, with bootstrap intervals and paired tests."""
