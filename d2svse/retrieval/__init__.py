"""Metrics, evaluation, stored embeddings, vector indexes and search."""

from d2svse.retrieval.backends import load_index, make_index
from d2svse.retrieval.engine import VectorIndex
from d2svse.retrieval.evaluation import evaluate, score_dataset
from d2svse.retrieval.filling import Changes
from d2svse.retrieval.fingerprint import model_fingerprint
from d2svse.retrieval.gallery import compose_gallery, draw_gallery, write_gallery_page
from d2svse.retrieval.image_text_index import ImageTextIndex
from d2svse.retrieval.index import ExactIndex
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
from d2svse.retrieval.search import Hit, Hits
from d2svse.retrieval.store import EmbeddingStore, encode_images, encode_texts
from d2svse.retrieval.streaming import Scorer, stream_rankings, stream_ranks

__all__ = [
    "PROTOCOLS",
    "Changes",
    "EmbeddingStore",
    "Evaluation",
    "ExactIndex",
    "Hit",
    "Hits",
    "ImageTextIndex",
    "Ranking",
    "RightAnswers",
    "Scorer",
    "VectorIndex",
    "bootstrap_intervals",
    "caption_answers",
    "compose_gallery",
    "draw_gallery",
    "encode_images",
    "encode_texts",
    "evaluate",
    "evaluate_protocol",
    "fold_metrics",
    "load_index",
    "make_index",
    "mean_metrics",
    "model_fingerprint",
    "ranking_metrics",
    "rankings",
    "ranks",
    "recall_at_k",
    "retrieval_metrics",
    "score_dataset",
    "stream_rankings",
    "stream_ranks",
    "write_gallery_page",
]
