"""Weights from elsewhere and to elsewhere: published checkpoints, and the Hub with its model cards."""

from d2svse.hub.card import CardFacts
from d2svse.hub.published import convert_published, load_published, write_published
from d2svse.hub.push import Pushed, make_repository, push_folder

__all__ = [
    "CardFacts",
    "Pushed",
    "convert_published",
    "load_published",
    "make_repository",
    "push_folder",
    "write_published",
]
