"""Artifacts on disk (weights and manifests), the only interface between stage 1 and stage 2."""
