"""Similarities between images and sentences, each usable on its own."""

from d2svse.similarity.base import Similarity, build_similarity, register_similarity, similarity_names
from d2svse.similarity.cosine import Cosine

__all__ = ["Cosine", "Similarity", "build_similarity", "register_similarity", "similarity_names"]
