"""Metrics, evaluation, the vector index and search."""

from d2svse.retrieval.evaluation import evaluate
from d2svse.retrieval.gallery import draw_gallery
from d2svse.retrieval.index import ExactIndex, VectorIndex
from d2svse.retrieval.metrics import ranks, recall_at_k, retrieval_metrics
from d2svse.retrieval.search import Hit, index_images, search, search_by_image

__all__ = [
    "ExactIndex",
    "Hit",
    "VectorIndex",
    "draw_gallery",
    "evaluate",
    "index_images",
    "ranks",
    "recall_at_k",
    "retrieval_metrics",
    "search",
    "search_by_image",
]
