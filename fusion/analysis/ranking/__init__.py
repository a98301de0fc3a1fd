"""Transferability scores: rank stored adapters for a target without training a full fusion."""
