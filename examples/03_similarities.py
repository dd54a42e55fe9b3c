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
# The similarity, which scores an image against a text, is a part of the model that you can replace. This notebook
# trains three models with three similarities. They start from equal weights and see equal batches, for an equal number
# of steps:
#
# - **cosine** of the two pooled vectors $x$ and $y$, each of length 1: $s = x^\top y$.
# - **GSSF**, block-diagonal: $s = x^\top (W \odot U) y$. $W$ is learned and starts as the identity, so training
#   starts from cosine. $U$ is 1 in blocks on the diagonal and 0 elsewhere. GSSF learns the weight of each dimension,
#   and which dimensions of a block belong together.
# - **OMIT**: $s = \sum_{kl} P_{kl} \, v_k^\top w_l$ over the patches $v_k$ of the image and the words $w_l$ of the
#   text. $P$ moves the mass of the patches to the words at the least cost $1 - v_k^\top w_l$, with an entropy term
#   (optimal transport). The pooled vectors of both sides join as one more patch and one more word, the *bins*. They
#   take the mass of background and filler words, and have no score.
#
# Cosine and GSSF compare one vector with one vector. OMIT compares all patches with all words. That is more expensive,
# but it shows *which word matches which part of the image* (notebook 6).

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
# `DATA` is the one path to change: a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, see notebook 1; None
# draws scenes. `EPOCHS` is the number of epochs for each similarity.

# %%
DATA = None
EPOCHS = 2
SIMILARITIES = ("cosine", "gssf-block-diagonal", "omit")
OUTPUT = Path("d2svse-examples/similarities")  # folder of all written files

# %%
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)


def new_model(similarity):
    """Return a model before training; only the similarity's own weights differ between models."""
    if DATA is None:
        vision = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
        return build_model(train.captions + train.dense_captions, vision=vision, similarity={"name": similarity})
    torch.manual_seed(42)
    backbones = "google/vit-base-patch16-224", "google-bert/bert-base-uncased"
    return D2SVSE.from_backbones(*backbones, similarity={"name": similarity})


def train_one(similarity):
    """Return a model trained with a similarity, its pairs per second, and its batch size."""
    model = new_model(similarity)
    settings = TRAINING | {"per_device_train_batch_size": 32} if DATA is None else PRESETS["recommended"]
    chosen = {"num_train_epochs": EPOCHS, "logging_steps": 0.05, "disable_tqdm": True}
    args = TrainingArguments(**settings | chosen, stage="align", output_dir=str(OUTPUT / "run" / similarity))
    trainer = Trainer(model, args, train, val)
    trainer.train()
    rates = [row["pairs_per_second"] for row in trainer.state.log_history if "pairs_per_second" in row]
    return model.eval(), sum(rates) / len(rates), args.per_device_train_batch_size


def keep(figure, name):
    """Write a figure to a file, and return it as an image for the notebook to show."""
    figure.savefig(OUTPUT / name)
    return Image.open(OUTPUT / name)


# %% [markdown]
# ## Train them
#
# The similarity is an argument of the model: its name, and optionally its own arguments, such as `{"name": "omit",
# "regularization": 0.02}`. Everything else is equal, including the order of the batches.

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
print_recalls({"chance": chance, **metrics}, f"{len(test)} test images, {EPOCHS} epochs each, percent")
for name, text in intervals.items():
    print(f"{name:20} {text}")

# %% [markdown]
# These are 95 % bootstrap intervals over the queries. They show how much the figure would change with other test
# captions. Another seed of training often changes it as much.
#
# On the drawn scenes, all three models learn and are well above chance. GSSF starts as cosine and is still close to
# it; their intervals overlap, so this test cannot separate them. OMIT is behind. **These figures show how fast a
# similarity starts from random weights, and not how good it becomes**: 50 steps are very few. The order may differ
# after thousands of steps, or with pretrained backbones. For a comparison to publish, train to the end with several
# seeds, choose on the validation set, and report the protocol.
#
# The encoders take most of the time of a step. The cost of a similarity grows with the batch: cosine costs $n^2 D$ for
# $n$ pairs of width $D$, and OMIT $n^2 K L D$ for $K$ patches and $L$ words. Here $K$ is 16; a ViT on photos has 197.
# The times depend on this machine and its load.
#
# ## Right pairs and wrong pairs
#
# Each panel shows how often a right pair scores higher than a wrong one. Each similarity has its own scale: 0.4 means
# different things in different panels.

# %%
keep(score_distributions(results), "scores.png")

# %% [markdown]
# ## Search with a similarity
#
# A bilinear score *folds*: its matrix is multiplied into the text's vector once, and the score is then a plain inner
# product. Every backend of an index can search that. OMIT does not fold. An index then finds candidates by one vector
# for each image, and reranks only the candidates by the exact score.

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
# Take `cosine` first, and for galleries of any size. `gssf-block-diagonal` has the same cost of search. Take `max-mean`
# or `omit` if single words decide, or if you want to see why an image was found.
#
# - [Similarities and losses](../docs/similarities.md): all twelve, with formulas and costs.
# - [Benchmarks](../docs/benchmarks.md): the cost of each on a quiet machine.
# - Notebook 4 adds a similarity. Notebook 6 draws what GSSF and OMIT have learned.
