"""Slot modules and heads: pure torch, plain numbers in, no config."""
