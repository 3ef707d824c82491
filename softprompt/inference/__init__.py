"""Inference: trained prompts in use, alone, in a bank or in an ensemble."""
