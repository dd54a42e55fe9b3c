"""Metrics, evaluation, the vector index and search."""

from d2svse.retrieval.evaluation import evaluate, score_dataset
from d2svse.retrieval.gallery import draw_gallery
from d2svse.retrieval.index import ExactIndex, VectorIndex
from d2svse.retrieval.metrics import (
    RightAnswers,
    caption_answers,
    fold_metrics,
    mean_metrics,
    ranks,
    recall_at_k,
    retrieval_metrics,
)
from d2svse.retrieval.protocols import PROTOCOLS
from d2svse.retrieval.ranking import Ranking, bootstrap_intervals, ranking_metrics, rankings
from d2svse.retrieval.report import Evaluation, evaluate_protocol
from d2svse.retrieval.search import Hit, index_images, search, search_by_image, search_exhaustively
from d2svse.retrieval.streaming import make_scorer, stream_rankings, stream_ranks

__all__ = [
    "PROTOCOLS",
    "Evaluation",
    "ExactIndex",
    "Hit",
    "Ranking",
    "RightAnswers",
    "VectorIndex",
    "bootstrap_intervals",
    "caption_answers",
    "draw_gallery",
    "evaluate",
    "evaluate_protocol",
    "fold_metrics",
    "index_images",
    "make_scorer",
    "mean_metrics",
    "ranking_metrics",
    "rankings",
    "ranks",
    "recall_at_k",
    "retrieval_metrics",
    "score_dataset",
    "search",
    "search_by_image",
    "search_exhaustively",
    "stream_rankings",
    "stream_ranks",
]
