"""Runs: identity, inputs, output, status, signals, sweeps and provenance."""
