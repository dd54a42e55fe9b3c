"""Metrics, rankings, protocols and the evaluation of a model."""
