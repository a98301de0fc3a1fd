"""Frozen transformers and their slots."""
