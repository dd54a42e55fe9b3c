"""Vector indexes, evaluation, stored embeddings and search in images and texts."""

from typing import TYPE_CHECKING

from d2svse.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "embeddings.store": ["EmbeddingStore", "encode_images", "encode_texts"],
        "evaluation.evaluate": ["evaluate"],
        "evaluation.metrics": [
            "RightAnswers",
            "caption_answers",
            "mean_metrics",
            "ranks",
            "retrieval_metrics",
        ],
        "evaluation.protocols": ["PROTOCOLS"],
        "evaluation.ranking": ["Ranking", "bootstrap_intervals", "ranking_metrics", "rankings"],
        "evaluation.report": ["Evaluation"],
        "evaluation.scorer": ["Scorer", "stream_rankings", "stream_ranks"],
        "evaluation.unimodal": ["evaluate_unimodal", "unimodal_metrics"],
        "search.contents": ["Changes"],
        "search.gallery": ["compose_gallery", "draw_gallery", "write_gallery_page"],
        "search.hits": ["Hit", "Hits"],
        "search.image_text_index": ["ImageTextIndex"],
        "vectors": ["VectorIndex", "load_index", "make_index"],
        "vectors.exact": ["ExactIndex"],
    },
)

if TYPE_CHECKING:
    from d2svse.retrieval.embeddings.store import EmbeddingStore as EmbeddingStore
    from d2svse.retrieval.embeddings.store import encode_images as encode_images
    from d2svse.retrieval.embeddings.store import encode_texts as encode_texts
    from d2svse.retrieval.evaluation.evaluate import evaluate as evaluate
    from d2svse.retrieval.evaluation.metrics import RightAnswers as RightAnswers
    from d2svse.retrieval.evaluation.metrics import caption_answers as caption_answers
    from d2svse.retrieval.evaluation.metrics import mean_metrics as mean_metrics
    from d2svse.retrieval.evaluation.metrics import ranks as ranks
    from d2svse.retrieval.evaluation.metrics import retrieval_metrics as retrieval_metrics
    from d2svse.retrieval.evaluation.protocols import PROTOCOLS as PROTOCOLS
    from d2svse.retrieval.evaluation.ranking import Ranking as Ranking
    from d2svse.retrieval.evaluation.ranking import bootstrap_intervals as bootstrap_intervals
    from d2svse.retrieval.evaluation.ranking import ranking_metrics as ranking_metrics
    from d2svse.retrieval.evaluation.ranking import rankings as rankings
    from d2svse.retrieval.evaluation.report import Evaluation as Evaluation
    from d2svse.retrieval.evaluation.scorer import Scorer as Scorer
    from d2svse.retrieval.evaluation.scorer import stream_rankings as stream_rankings
    from d2svse.retrieval.evaluation.scorer import stream_ranks as stream_ranks
    from d2svse.retrieval.evaluation.unimodal import evaluate_unimodal as evaluate_unimodal
    from d2svse.retrieval.evaluation.unimodal import unimodal_metrics as unimodal_metrics
    from d2svse.retrieval.search.contents import Changes as Changes
    from d2svse.retrieval.search.gallery import compose_gallery as compose_gallery
    from d2svse.retrieval.search.gallery import draw_gallery as draw_gallery
    from d2svse.retrieval.search.gallery import write_gallery_page as write_gallery_page
    from d2svse.retrieval.search.hits import Hit as Hit
    from d2svse.retrieval.search.hits import Hits as Hits
    from d2svse.retrieval.search.image_text_index import ImageTextIndex as ImageTextIndex
    from d2svse.retrieval.vectors import VectorIndex as VectorIndex
    from d2svse.retrieval.vectors import load_index as load_index
    from d2svse.retrieval.vectors import make_index as make_index
    from d2svse.retrieval.vectors.exact import ExactIndex as ExactIndex
