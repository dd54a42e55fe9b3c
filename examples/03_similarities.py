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
# # 3. Similarities side by side
#
# How a picture and a sentence are compared is a part of the model that can be swapped. Three are trained here, from
# the same weights, on the same batches, for the same number of steps:
#
# - **cosine** of the two pooled vectors $x$ and $y$, each of length 1: $s = x^\top y$.
# - **GSSF**, block-diagonal: $s = x^\top (W \odot U) y$. $W$ is learned and starts as the identity, so training
#   starts from cosine; $U$ is 1 in blocks on the diagonal and 0 elsewhere. It learns how much a dimension counts, and
#   which dimensions of a block belong together.
# - **OMIT**: $s = \sum_{kl} P_{kl} \, v_k^\top w_l$ over the patches $v_k$ of the picture and the words $w_l$ of the
#   sentence. $P$ moves the mass of the patches to the words at the least cost $1 - v_k^\top w_l$, with an entropy
#   term (optimal transport). The pooled vectors of both sides join as one more patch and one more word, the *bins*,
#   so that background and filler words have somewhere to go; they do not score.
#
# Cosine and GSSF compare one vector with one vector. OMIT compares everything with everything: dearer, but it can say
# *which word meets which part of the picture* (notebook 6).

# %%
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image
from transformers import ResNetConfig, logging

from d2svse import D2SVSE, ImageTextDataset, Trainer, TrainingArguments
from d2svse.cli.common import print_recalls
from d2svse.demo import TRAINING, build_model, draw_scenes
from d2svse.retrieval import evaluate
from d2svse.training.arguments import PRESETS
from d2svse.visualize import score_distributions

logging.disable_progress_bar()  # of reading and writing weights

# %% [markdown]
# `DATA` is the one path to change: a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, as notebook 1 tells;
# None draws scenes. `EPOCHS` is the budget of each similarity.

# %%
DATA = None
EPOCHS = 2
SIMILARITIES = ("cosine", "gssf-block-diagonal", "omit")
OUTPUT = Path("d2svse-examples/similarities")  # all that is written lies here

# %%
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)


def new_model(similarity):
    """A model before any training; all but the similarity's own weights are the same for every one."""
    if DATA is None:
        vision = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
        return build_model(train.captions + train.dense_captions, vision=vision, similarity={"name": similarity})
    torch.manual_seed(42)
    backbones = "google/vit-base-patch16-224", "google-bert/bert-base-uncased"
    return D2SVSE.from_backbones(*backbones, similarity={"name": similarity})


def train_one(similarity):
    """A model trained with a similarity, and the pairs that it went through in a second."""
    model = new_model(similarity)
    settings = TRAINING | {"per_device_train_batch_size": 32} if DATA is None else PRESETS["recommended"]
    chosen = {"num_train_epochs": EPOCHS, "logging_steps": 0.05, "disable_tqdm": True}
    args = TrainingArguments(**settings | chosen, stage="align", output_dir=str(OUTPUT / "run" / similarity))
    trainer = Trainer(model, args, train, val)
    trainer.train()
    rates = [row["pairs_per_second"] for row in trainer.state.log_history if "pairs_per_second" in row]
    return model.eval(), sum(rates) / len(rates), args.per_device_train_batch_size


def keep(figure, name):
    """Write a figure to a file, and give it back as a picture for the notebook to show."""
    figure.savefig(OUTPUT / name)
    return Image.open(OUTPUT / name)


# %% [markdown]
# ## Train them
#
# The similarity is an argument of the model, by its name, with its own arguments if need be: `{"name": "omit",
# "regularization": 0.02}`. Nothing else differs, the order of the batches included.

# %%
models, metrics, intervals, results = {}, {}, {}, {}
for name in SIMILARITIES:
    model, rate, batch_size = train_one(name)
    evaluation = evaluate([(name, model)], test)
    start = perf_counter()
    encode = {"output": model.similarity_fn.output, "convert_to_tensor": True}
    images, texts = model.encode_image(test.images, **encode), model.encode_text(test.captions, **encode)
    results[name] = model.similarity(images, texts), test.image_of_caption
    seconds = perf_counter() - start
    models[name], metrics[name] = model, evaluation.metrics
    low, high = evaluation.report()["intervals"]["t2i_recall_at_10"]
    times = f"{1000 * batch_size / rate:.0f} ms a step, {seconds:.1f} s to encode and score the test set"
    intervals[name] = f"T2I R@10 {100 * low:.0f} to {100 * high:.0f} %; {times}"

# %%
chance = {f"{side}_recall_at_{k}": k / len(test) for side in ("i2t", "t2i") for k in (1, 5, 10)}
chance["rsum"] = sum(chance.values())
print_recalls({"chance": chance, **metrics}, f"{len(test)} test pictures, {EPOCHS} epochs each, percent")
for name, text in intervals.items():
    print(f"{name:20} {text}")

# %% [markdown]
# The intervals are 95 % bootstrap intervals over the queries: how far the figure would move with other test captions.
# They do not tell how far it moves with another seed of training, which is often as much.
#
# What this shows, on the drawn scenes: each of the three learns, well above chance. GSSF starts as cosine and is
# still near it; their intervals overlap, and nothing tells them apart. OMIT lags. **That is how fast they start from
# random weights, not where they end**: 50 steps are no training, and a similarity that leads after them need not lead
# after thousands, or with backbones that have learned before. For a comparison that you would publish train to the
# end, with several seeds, choose on the validation set, and report the protocol.
#
# The time of a step is mostly the encoders'. What a similarity adds grows with the batch: cosine costs $n^2 D$ for
# $n$ pairs of width $D$, OMIT $n^2 K L D$ for $K$ patches and $L$ words. Here $K$ is 16; a ViT on photos has 197. The
# times are those of this machine, and of whatever else it was doing.
#
# ## How far right pairs stand from wrong ones
#
# Each panel tells how often a right pair scores higher than a wrong one. The scales are the similarities' own: a
# score of 0.4 of one says nothing about 0.4 of another.

# %%
keep(score_distributions(results), "scores.png")

# %% [markdown]
# ## What can be searched at once
#
# A bilinear score *folds*: the matrix is multiplied into the sentence's vector once, and what is left is a plain
# inner product, which any vector engine serves. OMIT does not fold; an index then finds candidates by one vector
# each, and scores only that exactly.

# %%
for name, model in models.items():
    similarity = model.similarity_fn
    print(f"{name:20} compares {similarity.requires:7} folds: {similarity.foldable}")

gssf = models["gssf-block-diagonal"]
x, y = gssf.encode_image(test.images, convert_to_tensor=True), gssf.encode_text(test.captions, convert_to_tensor=True)
with torch.no_grad():
    folded = gssf.similarity_fn.fold("image", x) @ gssf.similarity_fn.fold("text", y).T
assert torch.allclose(folded, results["gssf-block-diagonal"][0], atol=1e-5)
print("GSSF: the inner product of the folded vectors is the score")

# %% [markdown]
# ## Which one?
#
# Take `cosine` first, and where a gallery of any size is searched at once. `gssf-block-diagonal` costs the search
# nothing more. `max-mean` or `omit` where single words decide, or where you want to see why a picture was found.
#
# - [Similarities and losses](../docs/similarities.md): all twelve, with formulas and costs.
# - [Benchmarks](../docs/benchmarks.md): what each costs on a quiet machine.
# - Notebook 4: one of your own. Notebook 6: what GSSF and OMIT have learned, drawn.
