"""The base class of similarities, and the table of their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from d2svse.choices import Candidates, Side
from d2svse.features import Features, unit
from d2svse.registry import Class, Registry
from d2svse.similarity.alignment import Alignment, PatchScores, TokenScores
from d2svse.similarity.use import in_use

UNSCORED = -1e4  # below every score, and finite, so that a loss that weighs it by 0 stays finite


class Similarity(nn.Module):
    """A score for every pair of an image and a text.

    A subclass writes `score`, or `fold` if it is bilinear. `score` is called outside autocast and with float32 (or
    float64) features. Methods tell everything that follows from its kind: what an index stores, how candidates are
    scored, what a map shows.

    Attributes:
        requires: "pooled" if the pooled vectors suffice, "tokens" if the tokens are needed.
    """

    requires: ClassVar[Literal["pooled", "tokens"]] = "pooled"

    def score(self, images: Features, texts: Features) -> Tensor:
        """Score all pairs: `(n_images, n_texts)`, higher is closer; by default the products of the folded vectors.

        Raises:
            TypeError: if the class writes neither `score` nor `fold`.
        """
        if not self.foldable:
            raise TypeError(f"{type(self).__name__} has neither a method score nor a method fold; write one of them")
        return self.fold("image", images.pooled) @ self.fold("text", texts.pooled).T

    @classmethod
    def from_config(cls, arguments: dict[str, Any], dim: int | None) -> Self:
        """Make one from the arguments of its configuration.

        Args:
            arguments: of the constructor.
            dim: width of the vectors, for a class that takes `dim` and is not given another.

        Raises:
            TypeError: if an argument is unknown.
            ValueError: if a value does not fit.
        """
        if dim is not None and "dim" in inspect.signature(cls).parameters:
            arguments = {"dim": dim, **arguments}
        return cls(**arguments)

    @classmethod
    def calibrated(cls, options: dict[str, Any], metric: str | Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of this similarity with a learned metric instead of cosine.

        Args:
            options: configuration of this similarity, `{"name": ..., **constructor_arguments}`.
            metric: structure of the metric, or the structure and its arguments, see `Metric`.

        Raises:
            ValueError: if the similarity takes no metric, or has a learned one already.
        """
        raise ValueError(f"the similarity {options['name']} takes no metric; leave it out")

    def penalty(self) -> Tensor | None:
        """A scalar that training adds to the loss, such as a weight penalty, or None."""
        return None

    def reset_parameters(self) -> None:
        """Initialise the parameters, with functions of `torch.nn.init`, which loading guards."""

    def forward(self, images: Features, texts: Features) -> Tensor:
        """Score all pairs, outside autocast; run backward outside of it too, as torch advises.

        Args:
            images: features of `n_images` images.
            texts: features of `n_texts` texts, of the same `embed_dim`.

        Returns:
            `(n_images, n_texts)` float32 (float64 for float64 input); higher is closer.

        Raises:
            ValueError: if the widths differ, tokens are needed and missing, or a subclass gives another shape.
        """
        with self.prepared(images, texts) as sides:
            return self._shaped(self.score(*sides), len(images), len(texts))

    def fold(self, side: Side, vectors: Tensor) -> Tensor:
        """Turn pooled vectors `(n, embed_dim)` of one side into ones whose inner product is the score.

        Only bilinear similarities have it: after folding both sides, `a @ b.T` equals `forward`,
        so that any vector index can serve the similarity.

        Raises:
            TypeError: if the similarity is not bilinear.
        """
        raise TypeError(f"{type(self).__name__} is not bilinear: it cannot be folded into an inner product")

    @property
    def foldable(self) -> bool:
        """Return whether `fold` is available."""
        return type(self).fold is not Similarity.fold

    @property
    def needs_tokens(self) -> bool:
        """Return whether features need tokens beside their pooled vectors."""
        return self.requires == "tokens"

    @property
    def compares_pooled(self) -> bool:
        """Return whether the pooled vectors have a part in the scores."""
        return not self.needs_tokens

    @property
    def output(self) -> Literal["pooled", "features"]:
        """Return the `output` to ask of `encode_image` and `encode_text`."""
        return "features" if self.needs_tokens else "pooled"

    def compared(self, features: Features) -> Features:
        """Keep what the similarity compares: the pooled vectors, and the tokens where it needs them."""
        return features if self.needs_tokens else Features(features.pooled)

    def candidates(self, wanted: Candidates = "mean") -> Candidates | None:
        """Choose what an index finds candidates by.

        Args:
            wanted: "mean" or "pooled", see `vectors`.

        Returns:
            None where inner products of `vectors` are the scores, which need no second stage; "pooled" where there
            are no tokens for a mean; else what was wanted.
        """
        return None if self.foldable else wanted if self.needs_tokens else "pooled"

    @in_use
    def vectors(self, side: Side, features: Features, candidates: Candidates | None = None) -> Tensor:
        """Return one vector an item, whose inner products are the scores or find candidates for them.

        Args:
            side: which side the features are of.
            features: `n` of them, with tokens for "mean".
            candidates: None for vectors whose inner products are the scores; "pooled" for the pooled vectors;
                "mean" for the mean of the L2-normalised tokens. Both are L2-normalised.

        Returns:
            `(n, dim)` float32.

        Raises:
            TypeError: with None, if the similarity is not bilinear.
        """
        if candidates is None:
            return self.fold(side, features.pooled).float()
        if candidates == "pooled":
            return unit(features.pooled.float())
        if features.tokens is None:
            raise ValueError("candidates by the mean of tokens need tokens; encode with output='features'")
        tokens = unit(features.tokens.float()).masked_fill(~features.real_tokens()[..., None], 0)
        return unit(tokens.sum(1))

    def pooled_vectors(self, side: Side, pooled: Tensor) -> Tensor:
        """Return `vectors` `(n, dim)` of pooled vectors `(n, embed_dim)` alone, as other libraries compare them.

        They have a gradient.
        """
        return self.fold(side, pooled).float() if self.foldable else unit(pooled.float())

    def score_some(self, images: Features, texts: Features, chosen: Tensor) -> Tensor:
        """Score some of the pairs, with gradient, where that takes less than all of them.

        Args:
            images: features of `n_images` images.
            texts: features of `n_texts` texts.
            chosen: `(n_images, n_texts)` bool, the pairs to score, at least one of each image.

        Returns:
            `(n_images, n_texts)`; the scores of `forward`, and for the other pairs them or `UNSCORED`.

        Raises:
            ValueError: as `forward`.
        """
        return self(images, texts)

    @property
    def vector_score(self) -> Literal["cosine", "dot"]:
        """Return how another library compares its `vectors`: "dot" if inner products are the scores, else "cosine"."""
        return "dot" if self.foldable else "cosine"

    @in_use
    def scorer(self, images: Features, texts: Features) -> Callable[[slice, slice], Tensor]:
        """Prepare both sides once; return a function that scores some images with some texts, `(rows, columns)`."""
        if not self.foldable:
            return lambda rows, columns: self._used(images[rows], texts[columns])
        left, right = self.fold("image", images.pooled), self.fold("text", texts.pooled)

        def score(rows: slice, columns: slice) -> Tensor:
            with torch.autocast(left.device.type, enabled=False):
                return left[rows] @ right[columns].T

        return score

    @in_use
    def score_candidates(
        self,
        side: Side,
        stored: Callable[[Sequence[str]], Features],
        queries: Features,
        candidates: Sequence[Sequence[str]],
    ) -> list[Tensor]:
        """Score each query with its candidates.

        Args:
            side: what is stored, "image" or "text"; the queries are of the other.
            stored: reads the features of some ids.
            queries: features of `n` queries.
            candidates: for each query the ids to score.

        Returns:
            For each query its scores `(len(candidates),)` float32, in the order of its candidates.
        """
        scores = []
        for row, ids in enumerate(candidates):
            query, items = queries[row : row + 1], stored(ids).to(queries.pooled.device)
            scores.append((self(items, query) if side == "image" else self(query, items)).flatten())
        return scores

    @in_use
    def alignment(self, images: Features, texts: Features) -> Alignment:
        """Return how one image's tokens and one text's words belong together.

        By default a similarity of pooled vectors scores each image token as if it were the whole image. One of tokens
        scores each image token alone with each word alone.

        Args:
            images: features of one image, with tokens `(1, n_patches, embed_dim)`.
            texts: features of one text, with tokens `(1, n_words, embed_dim)`.
        """
        real, words = images.real_tokens()[0], texts.real_tokens()[0]
        assert images.tokens is not None
        patches = images.tokens[0]
        if not self.needs_tokens:
            scores = self(Features(patches), Features(texts.pooled))[:, 0]
            return PatchScores(scores.masked_fill(~real, torch.nan))
        assert texts.tokens is not None
        sides = [Features(tokens, tokens[:, None]) for tokens in (patches, texts.tokens[0])]
        return TokenScores(self(*sides).masked_fill(~(real[:, None] & words), -torch.inf))

    @in_use
    def _used(self, images: Features, texts: Features) -> Tensor:
        scores: Tensor = self(images, texts)
        return scores

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

    def _shaped(self, scores: Tensor, *shape: int, method: str = "score") -> Tensor:
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


REGISTRY: Registry[Similarity] = Registry("similarity", "d2svse.similarities", example="omit")


def register_similarity(name: str) -> Callable[[Class], Class]:
    """Return a class decorator that adds a similarity under `name`.

    Raises:
        ValueError: if the name is taken by another class.
    """
    return REGISTRY.register(name)


def similarity_names() -> list[str]:
    """Return all names that `build_similarity` knows, those of installed packages included."""
    return REGISTRY.names()


def similarity_options(configuration: Any) -> dict[str, Any]:
    """Return the one form of what names a similarity: `{"name": ..., **constructor_arguments}`.

    Args:
        configuration: the name, or the name and the arguments; nothing (None, an empty one) is cosine.

    Raises:
        ValueError: if it is something else.
    """
    return REGISTRY.options(configuration or "cosine")


def build_similarity(configuration: str | Mapping[str, Any], dim: int | None = None) -> Similarity:
    """Make a similarity from a name, or from `{"name": ..., **constructor_arguments}`.

    Names come from `register_similarity` and from the entry-point group `d2svse.similarities`.

    Args:
        configuration: the name, or the name and the arguments.
        dim: width of the vectors, for a class that takes `dim` and is not given another.

    Raises:
        ValueError: if the name is unknown or an argument does not fit.
    """
    return REGISTRY.build(similarity_options(configuration), lambda cls, arguments: cls.from_config(arguments, dim))
