"""Tiny LLaVA models with random weights, saved as a user would name them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

SIZE, PATCH = 16, 8
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
WORDS = (
    "describe this image in detail user assistant : a the man woman dog cat red blue green yellow small large old "
    "street field house tree car table chair ball boat river beach hat shirt holding wearing standing sitting running "
    "near behind above below with and of on under two three many people sky grass water road wall window door light"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *dict.fromkeys(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="@@")  # words with spaces between
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=["<image>"], **names)


def save_tiny_llava(folder: Path, *, chat: bool = True, family: str = "llava", seed: int = 0) -> Path:
    """Save a model and its processor; without `chat` there is no chat template."""
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    parts = {
        "vision_config": CLIPVisionConfig(**small, image_size=SIZE, patch_size=PATCH, projection_dim=32),
        "text_config": LlamaConfig(**small, vocab_size=len(tokenizer), max_position_embeddings=512, **ids),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }
    torch.manual_seed(seed)
    processing = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processing |= {"chat_template": CHAT_TEMPLATE if chat else None}
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    if family == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**parts, image_seq_length=(SIZE // PATCH) ** 2))
        processor = LlavaProcessor(CLIPImageProcessorPil(**sizes), tokenizer, **processing)
    else:
        grid = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**parts, image_grid_pinpoints=grid))
        pictures = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=grid)
        processor = LlavaNextProcessor(pictures, tokenizer, **processing)
    with torch.no_grad():  # weights large enough that what is generated depends on the picture
        for parameter in model.parameters():
            parameter.mul_(8)
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
