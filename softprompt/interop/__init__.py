"""Interoperability: exports to other programs, and imports from them."""
