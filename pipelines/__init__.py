"""Whole journeys, made of the commands alone: each is a program of its own, run from a checkout."""
