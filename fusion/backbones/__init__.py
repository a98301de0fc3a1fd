"""Frozen transformers and the slots in them."""
