"""Kinds of task: each kind reads labels, builds the head, and defines loss, predictions and metrics."""
