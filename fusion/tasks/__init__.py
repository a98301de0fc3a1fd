"""Kinds of task: one object per kind reads labels, makes the head, and knows loss, predictions and metrics."""
