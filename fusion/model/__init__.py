"""Builds the adapted model: a frozen backbone, what its slots hold, and a head."""
