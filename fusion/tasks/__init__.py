"""Kinds of task: one object per kind reads labels, builds the head, and defines loss, predictions and metrics."""
