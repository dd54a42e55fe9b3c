"""What every similarity is, and the table of their names."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from d2svse.features import Features

ENTRY_POINT_GROUP = "d2svse.similarities"
_TABLE: dict[str, type[Similarity]] = {}


class Similarity(nn.Module, ABC):
    """A score for every pair of an image and a sentence.

    A subclass writes `score`, and `score_pairs` where the diagonal is cheaper than the whole
    matrix. Both are called outside autocast and with float32 (or float64) features.

    Attributes:
        requires: "pooled" if the pooled vectors suffice, "tokens" if the fragments are needed.
    """

    requires: ClassVar[Literal["pooled", "tokens"]] = "pooled"

    @abstractmethod
    def score(self, images: Features, texts: Features) -> Tensor:
        """Score all pairs: `(n_images, n_texts)`, higher is closer."""

    def score_pairs(self, images: Features, texts: Features) -> Tensor:
        """Score image i with text i: `(n,)`."""
        one_by_one = [self.score(images[i : i + 1], texts[i : i + 1])[0, 0] for i in range(len(images))]
        return torch.stack(one_by_one) if one_by_one else images.pooled.new_zeros(0)

    def penalty(self) -> Tensor | None:
        """A scalar that training adds to the loss, such as a weight penalty, or None."""
        return None

    def reset_parameters(self) -> None:
        """Initialise the parameters, with the functions of `transformers.initialization`."""

    def forward(self, images: Features, texts: Features) -> Tensor:
        """Score all pairs, outside autocast; run backward outside of it too, as torch advises.

        Args:
            images: features of `n_images` images.
            texts: features of `n_texts` sentences, of the same `embed_dim`.

        Returns:
            `(n_images, n_texts)` float32 (float64 for float64 input); higher is closer.

        Raises:
            ValueError: if the widths differ, tokens are needed and missing, or a subclass gives another shape.
        """
        with self.prepared(images, texts) as sides:
            return self._shaped("score", self.score(*sides), len(images), len(texts))

    def pairwise(self, images: Features, texts: Features) -> Tensor:
        """Score image i with text i: `(n,)`, equal to the diagonal of `forward`.

        Raises:
            ValueError: as `forward`, and if the two sides differ in number.
        """
        with self.prepared(images, texts) as sides:
            if len(images) != len(texts):
                raise ValueError(f"pairwise needs as many images as texts, got {len(images)} and {len(texts)}")
            return self._shaped("score_pairs", self.score_pairs(*sides), len(images))

    def fold(self, side: Literal["image", "text"], vectors: Tensor) -> Tensor:
        """Turn pooled vectors `(n, embed_dim)` of one side into ones whose inner product is the score.

        Only bilinear similarities have it: after folding both sides, `a @ b.T` equals `forward`,
        so that any vector engine can serve the similarity.

        Raises:
            TypeError: if the similarity is not bilinear.
        """
        raise TypeError(f"{type(self).__name__} is not bilinear: it cannot be folded into an inner product")

    @property
    def foldable(self) -> bool:
        """Whether `fold` is available."""
        return type(self).fold is not Similarity.fold

    @contextmanager
    def prepared(self, images: Features, texts: Features) -> Iterator[tuple[Features, Features]]:
        """Check both sides, switch autocast off, and give them in float32 (all float64, if any part is).

        Raises:
            ValueError: as `forward`.
        """
        self._check(images, texts)
        parts = [part for side in (images, texts) for part in (side.pooled, side.tokens) if part is not None]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        with torch.autocast(images.pooled.device.type, enabled=False):
            yield images.to(dtype), texts.to(dtype)

    def _shaped(self, method: str, scores: Tensor, *shape: int) -> Tensor:
        if tuple(scores.shape) != shape:
            raise ValueError(f"{type(self).__name__}.{method} must give a tensor {shape}, got {tuple(scores.shape)}")
        return scores

    def _check(self, images: Features, texts: Features) -> None:
        if images.pooled.shape[1] != texts.pooled.shape[1]:
            raise ValueError(f"images are {images.pooled.shape[1]} wide and texts {texts.pooled.shape[1]}")
        if self.requires == "tokens":
            for name, side in (("images", images), ("texts", texts)):
                if side.tokens is None:
                    raise ValueError(
                        f"{type(self).__name__} compares tokens and the {name} have none; encode with output='features'"
                    )


SimilarityClass = TypeVar("SimilarityClass", bound=type[Similarity])


def register_similarity(name: str) -> Callable[[SimilarityClass], SimilarityClass]:
    """Class decorator that adds a similarity to the table under `name`.

    Raises:
        ValueError: if the name is taken by another class.
    """

    def add(cls: SimilarityClass) -> SimilarityClass:
        if _TABLE.get(name, cls) is not cls:
            raise ValueError(f"the similarity name {name!r} is taken by {_TABLE[name].__qualname__}")
        _TABLE[name] = cls
        return cls

    return add


def similarity_names() -> list[str]:
    """All names that `build_similarity` knows, those of installed packages included."""
    return sorted({*_TABLE, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def similarity_options(configuration: Any) -> dict[str, Any]:
    """The one form of what names a similarity: `{"name": ..., **constructor_arguments}`.

    Args:
        configuration: the name, or the name and the arguments; nothing (None, an empty one) is cosine.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(configuration, str):
        configuration = {"name": configuration}
    options = configuration or {"name": "cosine"}
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise ValueError(
            f'similarity must be a name such as "omit", or {{"name": "omit"}} with its arguments, got {options!r:.80}'
        )
    return dict(options)


def build_similarity(configuration: str | Mapping[str, Any], dim: int | None = None) -> Similarity:
    """Make a similarity from a name, or from `{"name": ..., **constructor_arguments}`.

    Names come from `register_similarity` and from the entry-point group `d2svse.similarities`.

    Args:
        configuration: the name, or the name and the arguments.
        dim: width of the vectors, for a class that takes `dim` and is not given another.

    Raises:
        ValueError: if the name is unknown or an argument does not fit.
    """
    arguments = similarity_options(configuration)
    name = arguments.pop("name")
    if name not in _TABLE:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name == name:
                register_similarity(point.name)(point.load())
                break
        else:
            raise ValueError(
                f"unknown similarity {name!r}; known are {', '.join(similarity_names())}; one of your own is known "
                f"once its module is imported, to commands by an entry point of the group {ENTRY_POINT_GROUP}"
            )
    if dim is not None and "dim" in inspect.signature(_TABLE[name]).parameters:
        arguments.setdefault("dim", dim)
    try:
        return _TABLE[name](**arguments)
    except TypeError as error:
        raise ValueError(f"similarity {name!r}: {error}") from error
