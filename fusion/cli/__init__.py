"""The Hydra application and the output of its commands."""
