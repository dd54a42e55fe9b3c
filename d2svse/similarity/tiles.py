"""Scores of all pairs of fragments, a tile at a time under a memory budget."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from d2svse.choices import check_counts, check_type
from d2svse.features import SMALLEST_NORM, Features, sent, unit
from d2svse.similarity.alignment import Alignment, TokenScores
from d2svse.similarity.base import UNSCORED, Side, Similarity
from d2svse.similarity.metric import Metric, MetricOptions
from d2svse.similarity.use import in_use

DEFAULT_MAX_MEMORY = 512 * 2**20
CACHED_ELEMENTS = 2**19  # of a tile's tensor on the CPU: larger ones leave the cache between two operations
NUM_BLOCKS = 4  # of a block-diagonal metric of fragments, the paper's "ratio"
HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)  # `torch.mm` into float32
IMAGES_TOGETHER = 16  # stored images, whose tokens stay in the CPU's cache
IMAGES_ON_DEVICE = 256  # fewer and larger kernels
QUERIES_TOGETHER = 64
LIKE_LENGTH = 0.75  # the shortest text of a tile has at least this share of the words of the longest


class Fragments(NamedTuple):
    """The fragments of one side, ready to be compared.

    Attributes:
        vectors: L2-normalised, `(n, length, dim)`.
        norms: what they were divided by, `(n, length)`.
        pooled: the normalised pooled vectors, `(n, dim)`.
        mapped: the vectors taken through the metric, `(n, length, dim)`; on the image side, and for
            cosine, the vectors themselves.
        mask: which fragments are real, `(n, length)` bool.
    """

    vectors: Tensor
    norms: Tensor
    pooled: Tensor
    mapped: Tensor
    mask: Tensor

    def cut(self, rows: slice | Tensor, length: int | None = None) -> Fragments:
        """Take some of the rows, and of each no more than the first `length` fragments."""
        vectors, norms, mask = (t[rows, :length] for t in (self.vectors, self.norms, self.mask))
        mapped = vectors if self.mapped is self.vectors else self.mapped[rows, :length]
        return Fragments(vectors, norms, self.pooled[rows], mapped, mask)


SIDE = len(Fragments._fields)


ProductDtype = Literal["float32", "bfloat16"]


class FragmentOptions(TypedDict, total=False):
    """The options of every similarity of fragments, see `FragmentSimilarity`."""

    metric: Metric
    max_memory: int
    product_dtype: ProductDtype


class FragmentSimilarity(Similarity, ABC):
    """A score from the fragments (patches, words) of both sides.

    A subclass writes `score_tile`. A tile is some images and some texts. Texts of like length are taken together and
    cut to the longest of them, so that little padding is computed. The products of all fragment pairs of a tile, and
    what is made from them, stay within `max_memory` (and on the CPU in its cache). The backward pass computes each tile
    anew and keeps only the fragments of the forward pass. The tile size does not change the scores.

    There are two ways to a score. `score` takes all pairs, by `tiles` and `score_tile`, in training and evaluation.
    `score_candidates` takes some, by `score_pairs`, when a search reranks; it calls `score_tile` too, unless a subclass
    has a faster `score_pairs` (`Transport` has one).

    A configuration names the metric: `{"name": "omit", "metric": "diagonal"}`, or with its arguments
    `{"metric": {"structure": "block-diagonal", "num_blocks": 8}}`; the arguments may also stand beside the metric. A
    block-diagonal metric has 4 blocks by default, as in the paper for fragments. Dropout of the metric's weights draws
    once for all pairs of a batch.

    Args:
        metric: how two fragments are compared; cosine without it.
        max_memory: budget of a tile in bytes.
        product_dtype: "bfloat16" rounds the fragments of float32 features to bfloat16 before they are multiplied. The
            products are summed in float32, and gradients are those of the rounded fragments.

    Raises:
        ValueError: if the budget is not positive, or the dtype of the products is unknown.
    """

    requires: ClassVar[Literal["pooled", "tokens"]] = "tokens"
    copies: ClassVar[int] = 8  # how many tensors of the size of a tile's products are alive at once

    def __init__(
        self,
        metric: Metric | None = None,
        max_memory: int = DEFAULT_MAX_MEMORY,
        product_dtype: ProductDtype = "float32",
    ) -> None:
        super().__init__()
        check_type("product_dtype", product_dtype, ProductDtype)
        check_counts(max_memory=int(max_memory))
        self.metric = metric or Metric()
        self.max_memory, self.product_dtype = int(max_memory), product_dtype

    @classmethod
    def from_config(cls, arguments: dict[str, Any], dim: int | None) -> Self:
        """Make one with the metric that is named; options of `Metric` beside it are the metric's."""
        parameters = inspect.signature(cls).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        arguments = dict(arguments)
        if "metric" in arguments or "metric" in parameters or takes_all:
            width = arguments.get("dim", dim)
            names = {"num_blocks", *MetricOptions.__annotations__} - parameters.keys()
            beside = {name: arguments.pop(name) for name in names & arguments.keys()}
            named = arguments.get("metric", "cosine")
            if not isinstance(named, Metric):
                named = {**beside, **({"structure": named} if isinstance(named, str) else named)}
            arguments["metric"] = Metric.from_config(named, width, num_blocks=NUM_BLOCKS)
        if "dim" not in parameters:
            arguments.pop("dim", None)  # which is the metric's
        return super().from_config(arguments, dim)

    @classmethod
    def calibrated(cls, options: dict[str, Any], metric: str | Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration with this metric instead of cosine."""
        if options.get("metric", "cosine") not in ("cosine", {"structure": "cosine"}):
            raise ValueError(f"the similarity {options['name']} has a metric already; leave another out")
        return {**options, "metric": metric}

    @abstractmethod
    def score_tile(self, images: Fragments, texts: Fragments, products: Tensor) -> Tensor:
        """Score all pairs of a tile. The backward pass calls it again and must get the same scores.

        Args:
            images: the tile's images.
            texts: the tile's texts.
            products: the metric of every two fragments, `(n_images, n_patches, n_texts, n_words)`;
                of padded fragments too.

        Returns:
            `(n_images, n_texts)`.
        """

    def try_tile(self, images: Fragments, texts: Fragments, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score a tile by a faster way that may fail.

        The outcomes of all tiles are read at once, because each read waits for the device. `score_tile` then scores
        the tiles that failed. The backward pass takes the same way for each tile.

        Returns:
            What `score_tile` gives, and whether it is right, 0-dimensional bool; None if it always is. This class calls
            `score_tile` and returns None.
        """
        return self.score_tile(images, texts, products), None

    def score(self, images: Features, texts: Features) -> Tensor:  # noqa: D102
        left, right = self.fragments(images, texts)
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        scores: Tensor = _TiledScores.apply(self, list(trained), *left, *right, *trained.values())
        return scores

    def fragments(self, images: Features, texts: Features) -> tuple[Fragments, Fragments]:
        """Make the fragments of both sides ready; the inner product of what is `mapped` is the metric."""
        left, right = _fragments(images), _fragments(texts)
        return left, right._replace(mapped=self.metric.apply_weight(right.vectors))

    def tiles(self, images: Fragments, texts: Fragments) -> Iterator[tuple[Tensor, int, list[slice]]]:
        """Cut the work into texts, the length to cut them to, and the slices of images to score them with."""
        n_images, n_patches = images.mask.shape
        elements = self._elements(images)
        words = elements // max(1, min(n_images * n_patches, math.isqrt(elements)))
        lengths = _lengths(texts)
        for index in like_lengths(lengths, words):
            width = lengths[index[0]]
            rows = max(1, elements // (len(index) * width * max(1, n_patches)))
            slices = [slice(i, i + rows) for i in range(0, n_images, rows)]
            yield sent(torch.tensor(index), texts.mask.device), width, slices

    @in_use
    def scorer(self, images: Features, texts: Features) -> Callable[[slice, slice], Tensor]:
        """Score all pairs at once, because single tiles are expensive."""
        scores = self(images, texts)
        return lambda rows, columns: scores[rows, columns]

    @in_use
    def score_candidates(
        self,
        side: Side,
        stored: Callable[[Sequence[str]], Features],
        queries: Features,
        candidates: Sequence[Sequence[str]],
    ) -> list[Tensor]:
        """Score candidates; read each block of stored items once for all queries that ask for it."""
        device = queries.pooled.device
        if side == "text":
            scores: list[Tensor] = []
            for start in range(0, len(queries), QUERIES_TOGETHER):
                some = candidates[start : start + QUERIES_TOGETHER]
                row_of = {name: row for row, name in enumerate(dict.fromkeys(name for part in some for name in part))}
                chosen = [[row_of[name] for name in part] for part in some]
                images = queries[start : start + QUERIES_TOGETHER]
                for parts in self._score_blocks([(images, chosen)], stored(list(row_of)).to(device)):
                    scores += parts
            return scores
        counts = [len(part) for part in candidates]
        of_all, query = torch.empty(sum(counts)), np.repeat(np.arange(len(counts)), counts)
        asked: dict[str, list[int]] = {}  # where the scores of an image belong
        for place, name in enumerate(chain.from_iterable(candidates)):
            asked.setdefault(name, []).append(place)
        names, together = list(asked), IMAGES_TOGETHER if device.type == "cpu" else IMAGES_ON_DEVICE
        blocks = [names[start : start + together] for start in range(0, len(names), together)]
        read = ((stored(block).to(device), [query[asked[name]].tolist() for name in block]) for block in blocks)
        for block, found in zip(blocks, self._score_blocks(read, queries), strict=True):
            of_all[[place for name in block for place in asked[name]]] = torch.cat(found).float().cpu()
        return list(of_all.split(counts))

    @torch.no_grad()
    def _score_blocks(
        self, blocks: Iterable[tuple[Features, Sequence[Sequence[int]]]], texts: Features
    ) -> Iterator[list[Tensor]]:
        """Score each image with some of the texts, without gradient. The texts are made ready once.

        Args:
            blocks: a few images at a time, so that they can be read meanwhile, and for each of them the rows of the
                texts to score.
            texts: features of texts.

        Yields:
            For each image of a block its scores `(len(rows),)`, as `forward` gives them.

        Raises:
            ValueError: as `forward`.
        """
        right: Fragments | None = None
        for images, chosen in blocks:
            with self.prepared(images, texts) as sides:
                if right is None:
                    left, right = self.fragments(*sides)
                    lengths = _lengths(right)
                else:
                    left, _ = self.fragments(sides[0], sides[1][:0])
                scores = self.score_pairs(left, right, lengths, chosen)
            yield scores

    def score_pairs(
        self, images: Fragments, texts: Fragments, lengths: Sequence[int], chosen: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Score each image with its own rows of the texts; `lengths` are the texts' numbers of words."""
        scores = []
        words = self._elements(images) // max(1, images.mask.shape[1])
        for row, rows in enumerate(chosen):
            image, own = images.cut(slice(row, row + 1)), images.vectors.new_zeros(len(rows))
            for group in like_lengths([lengths[i] for i in rows], words):
                index = [rows[position] for position in group]
                tile = texts.cut(sent(torch.tensor(index), own.device), lengths[index[0]])
                own[sent(torch.tensor(group), own.device)] = _multiply(self, image, tile, surely=True)[0][0]
            scores.append(own)
        return scores

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the inner products of `(m, dim)` and `(n, dim)` fragments, `(m, n)`, see `product_dtype`."""
        if self.product_dtype == "float32" or left.dtype != torch.float32:
            return left @ right.T
        product: Tensor = _RoundedProduct.apply(left, right)
        return product

    def score_some(self, images: Features, texts: Features, chosen: Tensor) -> Tensor:  # noqa: D102
        device, chosen = chosen.device, chosen.cpu()
        pairs = chosen.nonzero()
        image, text = sent(pairs.T.contiguous(), device)
        rows = [part.tolist() for part in pairs[:, 1].split(chosen.sum(1).tolist())]
        with self.prepared(images, texts) as sides:
            left, right = self.fragments(*sides)
            found = torch.cat(self.score_pairs(left, right, _lengths(right), rows))
            return found.new_full(chosen.shape, UNSCORED).index_put((image, text), found)

    def alignment(self, images: Features, texts: Features) -> Alignment:
        """Compare every image token with every word by the metric."""
        return TokenScores(self.products(images, texts))

    @in_use
    def products(self, images: Features, texts: Features) -> Tensor:
        """Return the metric of every image token and word of one image and one text.

        Returns:
            `(n_patches, n_words)` float32; -inf where either is padding.
        """
        with self.prepared(images, texts) as sides:
            left, right = self.fragments(*sides)
            products = left.mapped[0] @ right.mapped[0].T
            return products.masked_fill(~(left.mask[0][:, None] & right.mask[0]), float("-inf"))

    def _elements(self, images: Fragments) -> int:
        """Return how many elements a tile's tensor may have."""
        elements = max(1, self.max_memory // (images.vectors.element_size() * self.copies))
        return min(elements, CACHED_ELEMENTS) if images.mask.device.type == "cpu" else elements

    def reset_parameters(self) -> None:  # noqa: D102
        self.metric.reset_parameters()

    def penalty(self) -> Tensor | None:  # noqa: D102
        return self.metric.penalty()


def _fragments(features: Features) -> Fragments:
    assert features.tokens is not None
    if not features.tokens.shape[1]:  # one masked fragment stands for none
        mask = torch.zeros(len(features), 1, dtype=torch.bool, device=features.pooled.device)
        features = Features(features.pooled, F.pad(features.tokens, (0, 0, 0, 1)), mask)
    tokens = features.tokens
    assert tokens is not None
    if features.mask is not None:  # padding may hold NaN
        tokens = tokens.masked_fill(~features.mask[..., None], 0)
    vectors, norms = _Normalized.apply(tokens)
    return Fragments(vectors, norms, unit(features.pooled), vectors, features.real_tokens())


class _RoundedProduct(torch.autograd.Function):
    """Multiply fragments that are rounded to bfloat16, with sums in float32; the backward pass is in float32."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.bfloat16(), right.bfloat16()
        ctx.save_for_backward(left, right)
        if left.is_cuda and HAS_OUT_DTYPE:
            return torch.mm(left, right.T, out_dtype=torch.float32)
        return left.float() @ right.float().T  # a product of two bfloat16 is exact in float32

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        left, right = (side.float() for side in ctx.saved_tensors)
        with torch.autocast(upstream.device.type, enabled=False):
            return upstream @ right, upstream.T @ left


class _Normalized(torch.autograd.Function):
    """Return L2-normalised vectors and their norms; unlike `F.normalize`, keep no input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        norms = torch.linalg.vector_norm(tokens, dim=-1).clamp_(min=SMALLEST_NORM)
        vectors = tokens / norms[..., None]
        ctx.save_for_backward(vectors, norms)
        return vectors, norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, upstream_norms: Tensor) -> Tensor:
        vectors, norms = ctx.saved_tensors
        with torch.autocast(upstream.device.type, enabled=False):
            along = (upstream.unsqueeze(-2) @ vectors.unsqueeze(-1)).flatten(-3)
            inverse = norms.reciprocal().masked_fill_(norms <= SMALLEST_NORM, 0)  # a zero vector has no direction
            gradient = upstream * inverse[..., None]
            return gradient.addcmul_(vectors, (upstream_norms - along * inverse)[..., None])


def _lengths(texts: Fragments) -> list[int]:
    """Return the number of words of each text up to the last real one, at least 1."""
    positions = torch.arange(1, texts.mask.shape[1] + 1, device=texts.mask.device)
    return F.pad(texts.mask * positions, (1, 0), value=1).amax(-1).tolist()


def like_lengths(lengths: Sequence[int], words: int) -> Iterator[list[int]]:
    """Yield groups of texts of similar length, the longest first, of at most about `words` words."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group:
            longest = lengths[group[0]]
            if (len(group) + 1) * longest > words or lengths[i] < LIKE_LENGTH * longest:
                yield group
                group = []
        group.append(i)
    if group:
        yield group


class _TiledScores(torch.autograd.Function):
    """Score all pairs tile by tile; compute every tile anew for the gradient."""

    @staticmethod
    def forward(ctx: Any, similarity: FragmentSimilarity, names: list[str], *tensors: Tensor) -> Tensor:
        ctx.similarity, ctx.names = similarity, names
        ctx.save_for_backward(*tensors)
        images, texts = Fragments(*tensors[:SIDE]), Fragments(*tensors[SIDE : 2 * SIDE])
        scores = images.vectors.new_zeros(len(images.mask), len(texts.mask))
        ctx.plan, ctx.failed = list(similarity.tiles(images, texts)), set()
        tried: list[tuple[tuple[int, int], Tensor]] = []
        for number, (index, width, slices) in enumerate(ctx.plan):
            some_texts = texts.cut(index, width)
            for part, rows in enumerate(slices):
                own, right = _multiply(similarity, images.cut(rows), some_texts)
                scores[rows].index_copy_(1, index, own)
                if right is not None:
                    tried.append(((number, part), right))
        if tried:
            outcomes = torch.stack([right for _, right in tried]).tolist()
            ctx.failed = {tile for (tile, _), right in zip(tried, outcomes, strict=True) if not right}
        for number, part in ctx.failed:
            index, width, slices = ctx.plan[number]
            some_images, some_texts = images.cut(slices[part]), texts.cut(index, width)
            scores[slices[part]].index_copy_(1, index, _multiply(similarity, some_images, some_texts, surely=True)[0])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        with torch.autocast(upstream.device.type, enabled=False):
            return None, None, *_gradients(ctx, upstream)


def _gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """Return the gradients of both sides and of the parameters; None where there is none."""
    similarity, tensors, needed = ctx.similarity, ctx.saved_tensors, ctx.needs_input_grad[2:]
    if not upstream.numel():  # a process without images still takes part in the reduction of gradients
        return [torch.zeros_like(t) if wanted else None for t, wanted in zip(tensors, needed, strict=True)]
    images, texts = Fragments(*tensors[:SIDE]), Fragments(*tensors[SIDE : 2 * SIDE])
    # copies: no hook of the parameters runs here, and swapped parameters are respected
    trained = [p.detach().requires_grad_(w) for p, w in zip(tensors[2 * SIDE :], needed[2 * SIDE :], strict=True)]
    swapped = {f"similarity.{name}": parameter for name, parameter in zip(ctx.names, trained, strict=True)}
    module = _Tile(similarity)
    chosen = [k for k, wanted in enumerate(needed) if wanted]
    gradients: list[Tensor | None] = [None] * len(tensors)

    def leaves(cut: Fragments, first: int) -> Fragments:
        wanted = needed[first : first + SIDE]
        return Fragments(*(t.detach().requires_grad_(wish) for t, wish in zip(cut, wanted, strict=True)))

    def collect(k: int, rows: slice | Tensor, gradient: Tensor) -> None:
        whole = gradients[k]
        if whole is None:  # made late: what no tile uses takes no memory
            whole = gradients[k] = torch.zeros_like(tensors[k])
        part = whole[:, : gradient.shape[1]]
        part[rows] += gradient

    for number, (index, width, slices) in enumerate(ctx.plan):
        some_texts = leaves(texts.cut(index, width), SIDE)
        of_texts: list[Tensor | None] = [None] * len(tensors)
        for part_number, rows in enumerate(slices):
            some_images, surely = leaves(images.cut(rows), 0), (number, part_number) in ctx.failed
            inputs = [*some_images, *some_texts, *trained]
            with torch.enable_grad():
                part = functional_call(module, swapped, (some_images, some_texts, surely))
            if not part.requires_grad:
                continue
            sources = [inputs[k] for k in chosen]
            found = torch.autograd.grad(part, sources, upstream[rows].index_select(1, index), allow_unused=True)
            for k, gradient in zip(chosen, found, strict=True):
                if gradient is None:
                    continue
                if k < SIDE:
                    collect(k, rows, gradient)
                else:
                    sums = of_texts if k < 2 * SIDE else gradients
                    before = sums[k]
                    sums[k] = gradient if before is None else before + gradient
        for k, whole in enumerate(of_texts):
            if whole is not None:
                collect(k, index, whole)
    return gradients


class _Tile(nn.Module):
    """`_multiply` as a module, so that parameters can be swapped."""

    def __init__(self, similarity: FragmentSimilarity) -> None:
        super().__init__()
        self.similarity = similarity

    def forward(self, images: Fragments, texts: Fragments, surely: bool) -> Tensor:
        return _multiply(self.similarity, images, texts, surely)[0]


def _multiply(
    similarity: FragmentSimilarity, images: Fragments, texts: Fragments, surely: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Make the products of all fragments of a tile, and their scores by `try_tile`, or `surely` by `score_tile`."""
    products = similarity.multiply(images.mapped.flatten(0, 1), texts.mapped.flatten(0, 1))
    products = products.view(*images.mask.shape, *texts.mask.shape)
    right: Tensor | None = None
    if surely:
        scores = similarity.score_tile(images, texts, products)
    else:
        scores, right = similarity.try_tile(images, texts, products)
    return similarity._shaped(scores, len(images.mask), len(texts.mask), method="score_tile"), right
