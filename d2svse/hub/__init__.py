"""Weights from elsewhere and to elsewhere: the published checkpoints."""

from d2svse.hub.published import convert_published, load_published, write_published

__all__ = ["convert_published", "load_published", "write_published"]
