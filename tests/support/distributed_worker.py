"""The gradients of every case, by one process or by several that share each batch."""

import copy
import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, ResNetConfig, ViTConfig

from d2svse import D2SVSE, D2SVSEConfig, ImageTextDataset, Trainer, TrainingArguments
from d2svse.data import Batch
from d2svse.losses import build_distillation_loss, build_loss
from d2svse.training.building import tie_temperature
from d2svse.training.distributed import average_gradients, share_batch_norm
from d2svse.training.gradcache import cached_backward
from d2svse.training.tasks import AlignTask, DistillTask, UnimodalTask, freeze_unused, total_loss

LOSSES = {
    "infonce": {"name": "infonce"},
    "learned temperature": {"name": "infonce", "learn_temperature": True},
    "sigmoid": {"name": "sigmoid"},
    "sigmoid, learned": {"name": "sigmoid", "learn_temperature": True},
    "hinge, sum": {"name": "hinge", "mining": "sum"},
    "hinge, hardest": {"name": "hinge", "mining": "hardest"},
    "cmpm": {"name": "cmpm"},
    "max-polynomial": {"name": "max-polynomial"},
}
SIMILARITIES = ("gssf-diagonal", "gssf-block-diagonal", "gssf-dense", "max-mean", "max-softmax", "scan-t2i", "omit")
DISTILLATIONS = ("cosine", "l1", "l2", "kl")
IMAGE_SIZE, DIM = 16, 12


def make_model(*options: Any) -> D2SVSE:
    """One of the models, as it was made."""
    return copy.deepcopy(build_model(*options))


@functools.cache
def build_model(similarity: str = "cosine", decoder: bool = False, batch_norm: bool = False) -> D2SVSE:
    """A tiny model in float64, without dropout; with batch norm a ResNet, and the published projection of words."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision: Any = ViTConfig(**small, **off, image_size=IMAGE_SIZE, patch_size=8)
    if batch_norm:
        vision = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    text = BertConfig(**small, **off, vocab_size=50, max_position_embeddings=16)
    sides: dict[str, Any] = {"vision_config": vision.to_dict(), "text_config": text.to_dict()}
    projection = "residual_mlp" if batch_norm else "linear"
    model = D2SVSE(D2SVSEConfig(**sides, embed_dim=DIM, similarity=similarity, text_projection=projection))
    if decoder:
        model.add_decoder(num_tokens=2, num_layers=1, num_heads=2)
    return model.double().train()


def make_batch(size: int) -> Batch:
    """Pairs of which the last two show the same image, with sentences of uneven lengths."""
    generator = torch.Generator().manual_seed(size)
    lengths = torch.randint(3, 9, (size,), generator=generator)
    return Batch(
        pixel_values=torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).double(),
        input_ids=torch.randint(1, 50, (size, 8), generator=generator),
        attention_mask=(torch.arange(8) < lengths[:, None]).long(),
        image_ids=torch.arange(size).clamp(max=size - 2),
        valid=torch.ones(size, dtype=torch.bool),
        teacher_embeds=torch.randn(size, DIM, generator=generator).double(),
    )


def make_views(side: str, size: int) -> Batch:
    """Pairs of one side, of which the last two have one identity."""
    pairs, others = make_batch(size), make_batch(size + 2)[:size]
    views = []
    for view in (pairs, others):
        identities = replace(view, identities=pairs.image_ids, teacher_embeds=None)
        if side == "text":
            views.append(replace(identities, pixel_values=None))
        else:
            empty = view.input_ids[:, :0]
            views.append(replace(identities, input_ids=empty, attention_mask=empty))
    return replace(views[0], second=views[1])


def cases(every: bool) -> Iterator[tuple[str, Any, Any, Batch, int]]:
    """Name, model, task, batch and chunk size of the cases.

    Args:
        every: All of them; else small batches are for the losses alone, without chunks.
    """
    for size in (7, 3):
        model, task = make_model("cosine", False, True), AlignTask(build_loss("infonce"))
        yield f"batch norm, {size} pairs", model, task, make_batch(size), 0
        few = size == 3 and not every
        for chunk_size in (0,) if few else (0, 2):
            end = f", {size} pairs{', chunks' if chunk_size else ''}"
            for name, loss in LOSSES.items():
                yield name + end, make_model(), AlignTask(build_loss(loss)), make_batch(size), chunk_size
            if few:
                continue
            for name in SIMILARITIES:
                task = AlignTask(build_loss("infonce"))
                yield name + end, make_model(name), task, make_batch(size), chunk_size
            for name in DISTILLATIONS:
                task = DistillTask(build_loss("infonce"), build_distillation_loss(name))
                model = make_model("gssf-diagonal", True)
                yield "distil by " + name + end, model, task, make_batch(size), chunk_size
            for side in ("image", "text"):
                for name in ("cosine", "max-mean"):
                    task = UnimodalTask(build_loss("infonce"), side)
                    yield f"{side} by {name}{end}", make_model(name), task, make_views(side, size), chunk_size


def static_cases() -> Iterator[tuple[str, Any, Any, Batch, int]]:
    """The cases of a static graph, as `cases` has them."""
    for name in ("cosine", "omit"):
        yield name, make_model(name), AlignTask(build_loss("infonce")), make_batch(7), 0


def gradients(
    model: Any, task: Any, batch: Batch, chunk_size: int, static_graph: bool = False
) -> dict[str, torch.Tensor]:
    """Loss and gradients of a batch of which this process takes its share; with a static graph, of its second pass."""
    tie_temperature(model, task.loss)
    wrapped = model
    frozen = share_batch_norm(model, model.device)
    if dist.is_initialized():
        freeze_unused(model, task, batch[:2])
    for layer in frozen:
        layer.eval()
    if dist.is_initialized():
        wrapped = DistributedDataParallel(model, static_graph=static_graph)
        batch = share(batch, dist.get_rank(), dist.get_world_size())
    first: dict[str, torch.Tensor] = {}
    for passed in range(2 if static_graph else 1):
        if passed:
            first = {
                f"{name}, first pass": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }
            model.zero_grad()
        if chunk_size:
            with wrapped.no_sync() if wrapped is not model else torch.enable_grad():
                parts = cached_backward(wrapped, task, batch, chunk_size, lambda loss: loss.backward())
            average_gradients(wrapped.parameters())
        else:
            parts = task(wrapped, batch)
            total_loss(parts).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {"loss": total_loss(parts).detach(), **found, **first, **statistics}


def share(batch: Batch, rank: int, size: int) -> Batch:
    """The part of a batch that `EpochBatches` and `Collator` give to a process."""
    rows = torch.arange(len(batch)).tensor_split(size)[rank]
    return batch[rows] if len(rows) else replace(batch[:1], valid=torch.tensor([False]))


def main(output: str, kind: str) -> None:
    """Write the gradients that the processes come to together in the cases "every", "few" or "static"."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, *case in static_cases() if kind == "static" else cases(kind == "every"):
        for key, tensor in gradients(*case, static_graph=kind == "static").items():
            found[f"{name}/{key}"] = tensor.clone()
    if dist.get_rank() == 0:
        save_file(found, output)
    _leave()


def train_in_chunks(start: str, manifest: str, output: str) -> None:
    """Train a model in chunks for some steps, and write its tensors as this process has them."""
    torch.set_num_threads(1)
    args = TrainingArguments(
        output_dir=output, stage="align", chunk_size=3, max_steps=4, per_device_train_batch_size=6, use_cpu=True,
        gradient_accumulation_steps=2, save_strategy="no", eval_strategy="no", load_best_model_at_end=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(D2SVSE.from_pretrained(start), args, ImageTextDataset.from_manifest(manifest))
    trainer.train()
    state = {name: tensor.clone().contiguous() for name, tensor in trainer.model.state_dict().items()}
    save_file(state, f"{output}/{dist.get_rank()}.safetensors")
    _leave()


def _leave() -> None:
    """End the process without the destructors of torch: that of gloo's process group can wait for a lock for ever."""
    dist.destroy_process_group()
    os._exit(0)
