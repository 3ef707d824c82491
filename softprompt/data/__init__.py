"""Data: records, templates, examples and batches."""
