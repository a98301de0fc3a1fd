"""The Hydra application and what its commands print."""
