"""Metrics, evaluation, stored embeddings, vector indexes and search."""

from d2svse.retrieval.backends import load_index, make_index
from d2svse.retrieval.engine import VectorIndex
from d2svse.retrieval.evaluation import evaluate, score_dataset
from d2svse.retrieval.filling import Changes
from d2svse.retrieval.fingerprint import model_fingerprint
from d2svse.retrieval.gallery import draw_gallery, write_gallery_page
from d2svse.retrieval.image_text_index import ImageTextIndex
from d2svse.retrieval.index import ExactIndex
from d2svse.retrieval.metrics import fold_metrics, mean_metrics, ranks, recall_at_k, retrieval_metrics
from d2svse.retrieval.search import Hit
from d2svse.retrieval.store import EmbeddingStore, encode_images, encode_texts

__all__ = [
    "Changes",
    "EmbeddingStore",
    "ExactIndex",
    "Hit",
    "ImageTextIndex",
    "VectorIndex",
    "draw_gallery",
    "encode_images",
    "encode_texts",
    "evaluate",
    "fold_metrics",
    "load_index",
    "make_index",
    "mean_metrics",
    "model_fingerprint",
    "ranks",
    "recall_at_k",
    "retrieval_metrics",
    "score_dataset",
    "write_gallery_page",
]
