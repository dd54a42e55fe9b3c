"""Metrics, evaluation, the vector index and search."""

from d2svse.retrieval.backends import load_index, make_index
from d2svse.retrieval.engine import VectorIndex
from d2svse.retrieval.evaluation import evaluate, score_dataset
from d2svse.retrieval.gallery import draw_gallery
from d2svse.retrieval.index import ExactIndex
from d2svse.retrieval.metrics import fold_metrics, mean_metrics, ranks, recall_at_k, retrieval_metrics
from d2svse.retrieval.search import Hit, index_images, search, search_by_image, search_exhaustively

__all__ = [
    "ExactIndex",
    "Hit",
    "VectorIndex",
    "draw_gallery",
    "evaluate",
    "fold_metrics",
    "index_images",
    "load_index",
    "make_index",
    "mean_metrics",
    "ranks",
    "recall_at_k",
    "retrieval_metrics",
    "score_dataset",
    "search",
    "search_by_image",
    "search_exhaustively",
]
