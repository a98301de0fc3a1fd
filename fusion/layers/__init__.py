"""Slot modules and heads in pure PyTorch, with plain constructor arguments."""
