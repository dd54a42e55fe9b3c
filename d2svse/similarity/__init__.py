"""Similarities between images and texts, each usable on its own."""

from d2svse.similarity.attention import CrossAttentionI2T, CrossAttentionT2I, FocalAttention, NegativeAware
from d2svse.similarity.base import Similarity, build_similarity, register_similarity, similarity_names
from d2svse.similarity.comparison import ConcatMLP, LowRank, Mahalanobis, VectorMLP
from d2svse.similarity.cosine import Cosine
from d2svse.similarity.gssf import GSSF, GSSFBlockDiagonal, GSSFDense, GSSFDiagonal
from d2svse.similarity.metric import Metric
from d2svse.similarity.tiles import Fragments, FragmentSimilarity
from d2svse.similarity.token import MaxLogSumExp, MaxMean, MaxSoftmax, MaxSum
from d2svse.similarity.transport import OMIT, MoversDistance, TransportOutput, sinkhorn

__all__ = [
    "GSSF",
    "OMIT",
    "ConcatMLP",
    "Cosine",
    "CrossAttentionI2T",
    "CrossAttentionT2I",
    "FocalAttention",
    "FragmentSimilarity",
    "Fragments",
    "GSSFBlockDiagonal",
    "GSSFDense",
    "GSSFDiagonal",
    "LowRank",
    "Mahalanobis",
    "MaxLogSumExp",
    "MaxMean",
    "MaxSoftmax",
    "MaxSum",
    "Metric",
    "MoversDistance",
    "NegativeAware",
    "Similarity",
    "TransportOutput",
    "VectorMLP",
    "build_similarity",
    "register_similarity",
    "similarity_names",
    "sinkhorn",
]
