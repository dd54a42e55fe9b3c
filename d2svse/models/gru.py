"""A bidirectional GRU as a text backbone, with a vocabulary of words and vectors from a GloVe file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_LENGTH = 512
WORD_RANGE = 0.1  # words without a vector start from U(-0.1, 0.1), as in the published code of VSE++


@strict
class GRUConfig(PreTrainedConfig):
    """Configuration of a `GRUModel`.

    Args:
        vocab_size: number of words, special tokens included.
        embedding_size: width of the word vectors.
        hidden_size: width of each direction, and of the output.
        pad_token_id: token id of padding, whose word vector is zero.
    """

    model_type = "gru"

    vocab_size: int = 10_000
    embedding_size: int = 300
    hidden_size: int = 1024
    pad_token_id: int | None = 0


class GRUModel(PreTrainedModel):
    """Word vectors and one bidirectional GRU layer; the output is the mean of both directions.

    It is a text backbone of transformers, so `AutoModel` and `D2SVSE.from_backbones` load it from a folder.

    Args:
        config: the sizes; the weights are random.
    """

    config_class = GRUConfig
    base_model_prefix = "gru"
    main_input_name = "input_ids"
    _input_embed_layer = "word_embeddings"

    def __init__(self, config: GRUConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.forward_gru = nn.GRU(config.embedding_size, config.hidden_size, batch_first=True)
        self.backward_gru = nn.GRU(config.embedding_size, config.hidden_size, batch_first=True)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Encode words.

        Args:
            input_ids: `(batch, length)` int64, padded on the right.
            attention_mask: `(batch, length)`, non-zero where a token is real; None if all are real.

        Returns:
            `last_hidden_state (batch, length, hidden_size)`. Padding never changes the output at real tokens.
        """
        words = self.word_embeddings(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if attention_mask is None:
            order = positions.flip(0).expand_as(input_ids)
        else:
            lengths = (attention_mask.bool() * (positions + 1)).amax(1, keepdim=True)  # up to the last real token
            order = torch.where(positions < lengths, lengths - 1 - positions, positions)
        # Each text is turned round within its own length, so that the backward direction starts at its last word.
        ahead = self.forward_gru(words)[0]
        back = self.backward_gru(_reorder(words, order))[0]
        return BaseModelOutput(last_hidden_state=(ahead + _reorder(back, order)) / 2)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.GRU):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -WORD_RANGE, WORD_RANGE)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])


def _reorder(sequence: Tensor, order: Tensor) -> Tensor:
    return sequence.gather(1, order[..., None].expand(-1, -1, sequence.shape[2]))


def build_gru(
    texts: Iterable[str],
    word_vectors: str | os.PathLike[str] | None = None,
    *,
    min_count: int = 1,
    hidden_size: int = 1024,
    embedding_size: int = 300,
    seed: int = 42,
) -> tuple[GRUModel, PreTrainedTokenizerFast, int]:
    """Return a GRU backbone and its tokenizer, with the words of texts as the vocabulary.

    Save both to one folder with `save_pretrained`, and give the folder to `D2SVSE.from_backbones` or `--text`.

    Args:
        texts: the captions of the training set.
        word_vectors: a text file in the format of GloVe, see `read_word_vectors`; None for random vectors.
        min_count: leave out rarer words, which become the unknown word.
        hidden_size: width of each direction.
        embedding_size: width of random word vectors; a file has its own.
        seed: seed of the random weights.

    Returns:
        The model, the tokenizer, and the number of words with a vector from the file.

    Raises:
        ValueError: if no word is left, or the file of word vectors is not valid.
    """
    tokenizer = build_tokenizer(texts, min_count, MAX_LENGTH)
    vocabulary = tokenizer.get_vocab()
    found: dict[str, np.ndarray] = {}
    if word_vectors is not None:
        found, embedding_size = read_word_vectors(word_vectors, vocabulary)
    torch.manual_seed(seed)
    model = GRUModel(
        GRUConfig(vocab_size=len(tokenizer), embedding_size=embedding_size, hidden_size=hidden_size, pad_token_id=0)
    )
    with torch.no_grad():
        for word, vector in found.items():
            model.word_embeddings.weight[vocabulary[word]] = torch.from_numpy(vector)
    return model, tokenizer, len(found)


def build_tokenizer(texts: Iterable[str], min_count: int = 1, max_length: int = 96) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer with the words of texts in lower case; punctuation marks are words.

    Args:
        texts: the texts.
        min_count: leave out rarer words.
        max_length: longest text in tokens.

    Raises:
        ValueError: if no word is left.
    """
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = sorted(word for word, count in counts.items() if count >= min_count)
    if not words:
        raise ValueError(f"no word is in the texts {min_count} times or more; lower min_count")
    vocabulary = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    special = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def read_word_vectors(path: str | os.PathLike[str], words: Collection[str]) -> tuple[dict[str, np.ndarray], int]:
    """Read the vectors of some words from a text file: a word and its numbers on each line, as GloVe is published.

    A first line with the number of words and their width, as word2vec and fastText write it, is skipped.

    Args:
        path: the file, UTF-8.
        words: the words to read.

    Returns:
        The vector of each word found, `(width,)` float32, and the width.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if a line has another width or no numbers, or no word is found; the message names the line.
    """
    found: dict[str, np.ndarray] = {}
    width = 0
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such file; expected word vectors in the format of GloVe")
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            parts = line.rstrip().split(" ")
            if number == 1 and len(parts) == 2 and all(part.isdigit() for part in parts):
                continue
            width = width or len(parts) - 1
            word = " ".join(parts[:-width]) if width else ""  # some words of GloVe contain spaces
            if not word:
                raise ValueError(
                    f"{os.fspath(path)}:{number}: expected a word and {width or 'its'} numbers, separated by spaces"
                )
            if word not in words or word in found:
                continue
            try:
                vector = np.array([float(part) for part in parts[-width:]], dtype=np.float32)
            except ValueError:
                vector = np.array([np.nan])
            if not np.isfinite(vector).all():
                raise ValueError(f"{os.fspath(path)}:{number}: expected {width} finite numbers after {word!r:.80}")
            found[word] = vector
    if not found:
        raise ValueError(f"{os.fspath(path)}: holds none of the {len(words)} words of the captions")
    return found, width


AutoConfig.register(GRUConfig.model_type, GRUConfig, exist_ok=True)
AutoModel.register(GRUConfig, GRUModel, exist_ok=True)
