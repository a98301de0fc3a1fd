"""Transferability scores: rank stored adapters for a target before a fusion of them is trained."""
