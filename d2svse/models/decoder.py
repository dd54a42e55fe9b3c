"""The context decoder: learnable tokens that supply the content that a sparse caption omits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2svse.choices import Placement, check_type, unknown
from d2svse.features import at_least_float32
from d2svse.models.metric_attention import MetricAttention, MetricConfiguration
from d2svse.models.pooling import POOLINGS, build_pooling

NUM_TOKENS = 100  # as in the paper
POSITIONS = 640  # words and tokens


class ContextDecoder(nn.Module):
    """Run transformer layers over the words of a text and learnable tokens, and pool the tokens.

    Computes mean(Decoder([words, tokens])) over the outputs at the learnable tokens, the second
    term of D2S-VSE's Eq. 3; the caller adds the pooled text. Layers are pre-norm with GELU and a
    feed-forward width of 4 · embed_dim. A layer norm follows the last layer.

    Args:
        embed_dim: width of words and tokens.
        num_tokens: number of learnable tokens; 100 in the paper. With 0 the layers run over the words alone, and
            their outputs at the words are pooled.
        num_layers: number of transformer layers; 4 in the paper.
        num_heads: attention heads per layer; 4 in the paper.
        placement: "prefix" puts the tokens before the words, "postfix" after them, "surround"
            half on each side (the paper's best).
        positions: add a learned position embedding. Positions of the tokens after the words
            depend on the unpadded length of the text, so padding does not change the result.
        max_positions: largest number of words plus tokens for the position embedding.
        mask_padding: hide padded words from the attention. The published code does not.
        pooling: pooling of the outputs at the tokens: "mean" as in the paper, "gpo", "esa" or "max".
        metric: metric between query and key of every layer, such as "diagonal" (GSSF), see `MetricAttention`; None for
            plain attention.

    Raises:
        ValueError: if `placement` or `pooling` is unknown, or `num_heads` does not divide `embed_dim`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_tokens: int = NUM_TOKENS,
        num_layers: int = 4,
        num_heads: int = 4,
        placement: Placement = "surround",
        positions: bool = True,
        max_positions: int = POSITIONS,
        mask_padding: bool = True,
        pooling: str = "mean",
        metric: MetricConfiguration | None = None,
    ) -> None:
        super().__init__()
        before = {"prefix": num_tokens, "postfix": 0, "surround": num_tokens // 2}
        check_type("placement", placement, Placement)
        if pooling not in POOLINGS:
            raise ValueError(unknown("pooling", pooling, POOLINGS))
        if num_tokens < 0 or min(num_layers, num_heads) < 1:
            raise ValueError(
                "num_layers and num_heads of the decoder must be at least 1 and num_tokens at least 0, got "
                f"{num_layers}, {num_heads}, {num_tokens}"
            )
        if embed_dim % num_heads:
            raise ValueError(f"the decoder's {num_heads} heads do not divide the width {embed_dim}")
        self.num_before, self.mask_padding = before[placement], mask_padding
        self.num_after = num_tokens - self.num_before
        self.tokens = nn.Parameter(torch.empty(num_tokens, embed_dim).normal_(std=0.02))
        self.position_embeddings = nn.Embedding(max_positions, embed_dim) if positions else None
        layer = nn.TransformerEncoderLayer(
            embed_dim, num_heads, 4 * embed_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.has_metric = metric is not None
        if metric is not None:
            layer.self_attn = MetricAttention(embed_dim, num_heads, metric)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(embed_dim), enable_nested_tensor=False)
        self.pooling = build_pooling(pooling, embed_dim)

    def forward(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the pooled outputs at the learnable tokens for a batch of texts, see `outputs` and `pool`."""
        return self.pool(self.outputs(words, mask), mask)

    def pool(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool outputs.

        Args:
            outputs: output of `outputs`.
            mask: True where a word is real, `(batch, length)` bool; None if all words are real. It has a part only
                without learnable tokens.

        Returns:
            `(batch, embed_dim)` float32, or float64 for float64 outputs.
        """
        pooled: Tensor = self.pooling(outputs, None if len(self.tokens) else mask)
        return pooled

    def outputs(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the outputs at the learnable tokens for a batch of texts.

        Args:
            words: projected word features, `(batch, length, embed_dim)`.
            mask: True where a word is real, `(batch, length)` bool; None if all words are real.

        Returns:
            `(batch, num_tokens, embed_dim)`; without learnable tokens the outputs at the words.

        Raises:
            ValueError: if a text is too long for the position embedding.
        """
        batch, length, _ = words.shape
        tokens = self.tokens.to(words.dtype).expand(batch, -1, -1)
        before, after = tokens[:, : self.num_before], tokens[:, self.num_before :]
        sequence = torch.cat([before, words, after], dim=1)
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=words.device)
        real = F.pad(F.pad(mask, (self.num_before, 0), value=True), (0, after.shape[1]), value=True)
        if self.position_embeddings is not None:
            if sequence.shape[1] > self.position_embeddings.num_embeddings:
                limit = self.position_embeddings.num_embeddings - len(self.tokens)
                raise ValueError(f"a text of {length} tokens is longer than the decoder's {limit}; truncate it")
            sequence = sequence + self.position_embeddings((real.cumsum(1) - 1).clamp(min=0))
        hidden = ~real if self.mask_padding else None
        *layers, last = cast(Iterable[nn.TransformerEncoderLayer], self.layers.layers)
        for layer in layers:
            if self.has_metric:  # torch's own forward may take a fast path, which knows no metric
                sequence = self._run(layer, sequence, hidden, _everywhere)
            else:
                sequence = layer(sequence, src_key_padding_mask=hidden)
        assert self.layers.norm is not None
        positions = self._at_tokens if len(self.tokens) else _everywhere
        outputs: Tensor = self.layers.norm(self._run(last, sequence, hidden, positions))
        return outputs

    def _run(
        self,
        layer: nn.TransformerEncoderLayer,
        sequence: Tensor,
        hidden: Tensor | None,
        chosen: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Run a layer for the chosen positions only."""
        normed = layer.norm1(sequence)
        attended, _ = layer.self_attn(chosen(normed), normed, normed, key_padding_mask=hidden, need_weights=False)
        tokens = chosen(sequence) + attended
        inner: Tensor = layer.linear2(layer.activation(layer.linear1(layer.norm2(tokens))))
        return tokens + inner

    def _at_tokens(self, values: Tensor) -> Tensor:
        """Return the positions of the learnable tokens."""
        return torch.cat([values[:, : self.num_before], values[:, values.shape[1] - self.num_after :]], dim=1)


def _everywhere(values: Tensor) -> Tensor:
    return values


class ContextAttention(nn.Module):
    """Let learnable tokens attend to the words once, as the published code does without its decoder.

    Computes mean(tokens + Attention(tokens, words, words)).

    Args:
        embed_dim: width of words and tokens.
        num_tokens: number of learnable tokens.
        num_heads: number of attention heads.
        mask_padding: hide padded words from the attention. The published code does not.
        metric: metric between query and key, see `MetricAttention`; None for plain attention.

    Raises:
        ValueError: if `num_tokens` or `num_heads` is below 1, or `num_heads` does not divide `embed_dim`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_tokens: int = NUM_TOKENS,
        num_heads: int = 8,
        mask_padding: bool = True,
        metric: MetricConfiguration | None = None,
    ) -> None:
        super().__init__()
        if min(num_tokens, num_heads) < 1 or embed_dim % num_heads:
            raise ValueError(
                f"the context attention needs tokens, and heads that divide the width {embed_dim}; "
                f"got {num_tokens} tokens and {num_heads} heads"
            )
        self.mask_padding = mask_padding
        self.tokens = nn.Parameter(torch.empty(num_tokens, embed_dim))
        nn.init.normal_(self.tokens, std=0.02)
        self.attention = (
            nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
            if metric is None
            else MetricAttention(embed_dim, num_heads, metric)
        )

    def forward(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean over the learnable tokens for a batch of texts, see `outputs` and `pool`."""
        return self.pool(self.outputs(words, mask), mask)

    def pool(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean over the tokens: `(batch, embed_dim)` float32, or float64 for float64 outputs."""
        return outputs.mean(1)

    def outputs(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the learnable tokens after the attention for a batch of texts.

        Args:
            words: projected word features, `(batch, length, embed_dim)`.
            mask: True where a word is real, `(batch, length)` bool; None if all words are real.

        Returns:
            `(batch, num_tokens, embed_dim)` float32, or float64 for float64 words.
        """
        tokens = self.tokens.to(words.dtype).expand(words.shape[0], -1, -1)
        hidden = ~mask if mask is not None and self.mask_padding else None
        attended, _ = self.attention(tokens, words, words, key_padding_mask=hidden, need_weights=False)
        return at_least_float32(tokens + attended)


def with_positions(arguments: dict[str, Any], longest: int) -> dict[str, Any]:
    """Return arguments of `build_context_decoder`, with positions for the learnable tokens and the longest text.

    Args:
        arguments: the arguments; returned unchanged where the default is enough, or they say how many positions.
        longest: the longest text in tokens.
    """
    wanted = arguments.get("num_tokens", NUM_TOKENS) + longest
    without = arguments.get("kind") == "attention" or not arguments.get("positions", True)
    if without or "max_positions" in arguments or wanted <= POSITIONS:
        return arguments
    return {**arguments, "max_positions": wanted}


def build_context_decoder(embed_dim: int, kind: str = "decoder", **arguments: Any) -> ContextDecoder | ContextAttention:
    """Build the sparse branch that a configuration describes.

    Args:
        embed_dim: width of the joint space.
        kind: "decoder" for `ContextDecoder`, "attention" for `ContextAttention`.
        **arguments: further constructor arguments of that class.

    Raises:
        ValueError: if the kind or an argument is unknown, or a value is not allowed.
    """
    kinds: dict[str, type[ContextDecoder] | type[ContextAttention]] = {
        "decoder": ContextDecoder,
        "attention": ContextAttention,
    }
    if kind not in kinds:
        raise ValueError(unknown("kind of context decoder", kind, kinds))
    try:
        return kinds[kind](embed_dim, **arguments)
    except TypeError as error:
        raise ValueError(f"context decoder: {error}") from None
