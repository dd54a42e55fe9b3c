# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Train both stages
#
# People search by *sparse* sentences: short, and true of a part of the picture. A model that sees nothing else is
# asked to bring a picture and a sentence to one point though the sentence leaves most of the picture out. D2S-VSE
# (ICCV 2025) trains in two stages instead:
#
# 1. **pretrain** aligns pictures with *dense* text, which tells everything;
# 2. **distill** aligns them with sparse captions, and at the same time teaches the sparse sentence's vector to be
#    like the one that stage 1 gives the picture's dense text.
#
# This notebook trains both, looks at their curves, and compares them with the simplest thing that could be done
# instead: aligning sparse captions alone for as many steps.

# %%
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import ResNetConfig, logging

from d2svse import D2SVSE, ImageTextDataset, Trainer, TrainingArguments, evaluate
from d2svse.cli.common import print_recalls
from d2svse.demo import TRAINING, build_model, draw_scenes
from d2svse.training.arguments import PRESETS
from d2svse.visualize import read_logs, training_curves

logging.disable_progress_bar()  # of reading and writing weights

# %% [markdown]
# `DATA` is the one path to change: a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, as notebook 1 tells;
# None draws scenes. The budget is the epochs of each stage. Aligning alone gets the sum of both.

# %%
DATA = None
PRETRAIN_EPOCHS, DISTILL_EPOCHS = 1, 2
OUTPUT = Path("d2svse-examples/two-stages")  # all that is written lies here

# %%
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)


def new_model():
    """A model before any training: small and random for scenes, of pretrained backbones for photos."""
    if DATA is None:
        vision = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
        return build_model(train.captions + train.dense_captions, vision=vision)
    return D2SVSE.from_backbones("google/vit-base-patch16-224", "google-bert/bert-base-uncased")


def train_stage(model, stage, epochs):
    """Train a model through one stage; it ends with the weights of its best epoch."""
    settings = TRAINING | {"per_device_train_batch_size": 32} if DATA is None else PRESETS["recommended"]
    chosen = {"num_train_epochs": epochs, "logging_steps": 0.05, "disable_tqdm": True}
    args = TrainingArguments(**settings | chosen, stage=stage, output_dir=str(OUTPUT / "run" / stage))
    trainer = Trainer(model, args, train, val)
    trainer.train()
    return trainer


def keep(figure, name):
    """Write a figure to a file, and give it back as a picture for the notebook to show."""
    figure.savefig(OUTPUT / name)
    return Image.open(OUTPUT / name)


# %% [markdown]
# ## Dense and sparse
#
# Where a manifest has no dense text, `dense="auto"` joins a picture's captions: not as good as a description by a
# captioning model, but more than one sentence tells ([captioning](../docs/captioning.md) writes better ones).

# %%
sparse_words = np.mean([len(caption.split()) for caption in train.captions])
dense_words = np.mean([len(text.split()) for text in train.dense_captions])
print("sparse:", train.records[0].captions[0])
print("dense: ", train.records[0].dense)
print(f"a sparse caption has {sparse_words:.0f} words in the mean, a dense text {dense_words:.0f}")

# %% [markdown]
# ## Stage 1: pictures and dense text
#
# The ranking loss is InfoNCE: of a batch of $n$ pairs with scores $s_{ij}$ (picture $i$, text $j$), the right partner
# shall win the softmax over its row and over its column,
#
# $$L_{rank} = -\frac{1}{2n} \sum_i \left( \log \frac{e^{s_{ii}/\tau}}{\sum_j e^{s_{ij}/\tau}}
# + \log \frac{e^{s_{ii}/\tau}}{\sum_j e^{s_{ji}/\tau}} \right),$$
#
# with a temperature $\tau$ that is learned here. Every other picture of the batch is a negative, so a larger batch is
# a harder task. The paper ranks by a hinge with the hardest negative; from random weights that learns much more
# slowly ([results](../docs/results.md)), and `loss="hinge"` would choose it.

# %%
model = new_model()
train_stage(model, "pretrain", PRETRAIN_EPOCHS)
dense_ranked = evaluate(model, test, captions="dense").metrics
after = {"stage 1": evaluate(model, test).metrics}

# %% [markdown]
# ## Stage 2: pictures and sparse captions, with a teacher
#
# `Trainer` copies the text encoder of stage 1 and freezes it: the teacher. It reads each dense text once, and the
# vectors $t^d$ are kept beside the checkpoints. Then the *context decoder* is added, a few transformer layers over
# the words and some learnable tokens. What comes out at the tokens is added to the pooled sentence $t$ (Eq. 3 of
# D2S-VSE),
#
# $$\hat t = t + \mathrm{mean}(\mathrm{Decoder}([\mathrm{words}, \mathrm{tokens}])),$$
#
# and two terms are minimised together (Eq. 6): $L_{rank}$ of pictures and $\hat t$, and the distance $1 - \cos(\hat
# t, t^d)$. The teacher is not part of the model that is saved: a query has no dense text and needs none.

# %%
trainer = train_stage(model, "distill", DISTILL_EPOCHS)
after["stage 2"] = evaluate(model, test).metrics

# %% [markdown]
# ## Aligning alone, for as many steps
#
# A second stage is also more training. To see what the *two stages* gain, the baseline starts from the same random
# weights (or backbones) and gets as many steps as both stages had together, all of them with sparse captions.

# %%
baseline = new_model()
train_stage(baseline, "align", PRETRAIN_EPOCHS + DISTILL_EPOCHS)
after["aligning alone"] = evaluate(baseline, test).metrics

# %%
chance = {f"{side}_recall_at_{k}": k / len(test) for side in ("i2t", "t2i") for k in (1, 5, 10)}
chance["rsum"] = sum(chance.values())
print_recalls({"chance": chance, **after}, f"sparse captions of {len(test)} test pictures, percent")
print(f"stage 1, ranked by its dense text instead: T2I R@10 {100 * dense_ranked['t2i_recall_at_10']:.1f}")

# %% [markdown]
# How to read this, on the drawn scenes:
#
# - **Stage 1 is poor with sparse captions.** It has never seen one. With dense text, which it was trained on, it
#   finds twice as much; it has had 25 steps.
# - **Stage 2 is well above chance** after 50 more.
# - **Aligning alone is ahead.** All of its steps go into what is measured, and in so few that decides. When `d2svse
#   demo` trains on 4000 scenes for minutes, the two come out level ([results](../docs/results.md)). The paper
#   reports a gain by the two stages on Flickr30K and MS-COCO, with pretrained backbones and captions by a large
#   model, which was not repeated here. Compare both on your data before you choose.
#
# ## The curves
#
# A row of panels for each stage: losses, scores in a batch, recall on the validation set.

# %%
keep(training_curves(OUTPUT / "run"), "curves.png")

# %% [markdown]
# - **Losses.** Stage 2 logs both terms: `align loss` is $L_{rank}$, `distill loss` the distance to the dense vectors.
#   Compare with `loss_if_collapsed` of the log, the loss if all scores were the same: a run that stays there learns
#   nothing.
# - **Mean scores.** The right pairs must pull away from the *hardest* wrong pair of the batch. As long as that one
#   scores higher, the batch's R@1 is low.
# - **Recall.** The best epoch is the one with the highest rSum, the sum of the six recalls.
#
# The numbers behind the figure:

# %%
last = [row for row in read_logs(OUTPUT / "run")["distill"] if "embedding_std" in row][-1]
for name in ("align_loss", "loss_if_collapsed", "distill_loss", "negatives", "embedding_std"):
    print(f"{name:18} {last[name]:.3f}")

# %% [markdown]
# `embedding_std` is the spread of the vectors: 0 if all are the same, about 1 if they are random. `negatives` are the
# wrong sentences that each picture is compared with. [Training](../docs/training.md#watching) explains the rest.
#
# ## Save and load
#
# A model is saved with its processor, its similarity and its decoder, and gives the same scores when it is loaded.

# %%
model.save_pretrained(OUTPUT / "model")
loaded = D2SVSE.from_pretrained(OUTPUT / "model")
sentences = test.captions[:5]
before, now = (one.similarity(one.encode_image(test.images), one.encode_text(sentences)) for one in (model, loaded))
assert np.allclose(before, now, atol=1e-6)
print("decoder:", loaded.config.context_decoder)

# %% [markdown]
# ## Where to read on
#
# The same from a shell, with all options of `TrainingArguments` behind `--set`, and `--resume` after a stop:
#
# ```
# d2svse train --train train.jsonl --val val.jsonl --vision google/vit-base-patch16-224 \
#     --text google-bert/bert-base-uncased --stages pretrain,distill -o runs/first
# ```
#
# - [Concepts](../docs/concepts.md): the two stages, with figures.
# - [Training](../docs/training.md): several processes, batches larger than memory, LoRA, what is logged.
# - [Questions](../docs/faq.md): the loss does not fall, out of memory, no dense text.
