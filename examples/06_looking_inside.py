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
# # 6. Looking inside
#
# A recall says how often a model is right, but not why. This notebook trains two models and draws six views of them:
# how the training went, what the models retrieve, which word meets which part of an image, how right and wrong pairs
# score, what a metric has learned, and what the decoder's tokens add.
#
# - The **vectors** model goes through both stages of D2S-VSE and compares one embedding with another by GSSF: $s =
#   x^\top (W \odot U) \, y$. It has a metric and a decoder to look at.
# - The **words** model aligns images with dense captions, then with sparse captions, and compares words with patches:
#   each word $w_l$ takes its best patch $v_k$, $s = \frac{1}{L} \sum_l \max_k v_k^\top (W \odot U) \, w_l$. So it
#   shows which word meets which patch. It has no decoder, because a decoder changes only the pooled embedding, which
#   this score does not use.

# %%
from pathlib import Path

from PIL import Image
from transformers import ResNetConfig, logging

from d2svse import D2SVSE, ImageTextDataset, Trainer, TrainingArguments, evaluate
from d2svse.cli.common import print_recalls
from d2svse.demo import TRAINING, build_model, draw_scenes
from d2svse.similarity import OMIT
from d2svse.training.arguments import PRESETS
from d2svse.visualize import (
    context_neighbours,
    explain,
    metric_weights,
    nearest_dense,
    retrieval_gallery,
    score_distributions,
    training_curves,
)

logging.disable_progress_bar()  # hides the progress of reading and writing weights

# %% [markdown]
# `DATA` is the one path to change: a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, as in notebook 1. None
# draws scenes. The budget is the number of epochs with dense captions and with sparse captions. To look at your own
# model, replace the training by `model = D2SVSE.from_pretrained(...)`.

# %%
DATA = None
PRETRAIN_EPOCHS, SPARSE_EPOCHS = 1, 3
OUTPUT = Path("d2svse-examples/looking-inside")  # all files go here

# %%
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)


def train_stages(name, similarity, stages):
    """Train a model with a similarity through stages; `stages` gives the epochs of each."""
    if DATA is None:
        vision = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
        model = build_model(train.captions + train.dense_captions, vision=vision, similarity=similarity)
        settings = TRAINING | {"per_device_train_batch_size": 32}
    else:
        backbones = "google/vit-base-patch16-224", "google-bert/bert-base-uncased"
        model = D2SVSE.from_backbones(*backbones, similarity=similarity)
        settings = PRESETS["recommended"]
    for stage, epochs in stages.items():
        chosen = {"num_train_epochs": epochs, "logging_steps": 0.05, "disable_tqdm": True}
        args = TrainingArguments(**settings | chosen, stage=stage, output_dir=str(OUTPUT / name / stage))
        Trainer(model, args, train, val).train()
    return model.eval()


def keep(figure, name):
    """Write a figure to a file, and return it as an image for the notebook to show."""
    figure.savefig(OUTPUT / name)
    return Image.open(OUTPUT / name)


# %%
stages = {"pretrain": PRETRAIN_EPOCHS, "distill": SPARSE_EPOCHS}
of_vectors = train_stages("vectors", {"name": "gssf-block-diagonal"}, stages)
words = {"name": "max-mean", "direction": "t2i", "metric": "block-diagonal"}
of_words = train_stages("words", words, {"pretrain": PRETRAIN_EPOCHS, "align": SPARSE_EPOCHS})

# %%
chance = {f"{side}_recall_at_{k}": k / len(test) for side in ("i2t", "t2i") for k in (1, 5, 10)}
chance["rsum"] = sum(chance.values())
results = {"vectors": evaluate(of_vectors, test).metrics, "words": evaluate(of_words, test).metrics}
print_recalls({"chance": chance, **results}, f"{len(test)} test images, percent")

# %% [markdown]
# Both models are far above chance on the drawn scenes. They differ in more than their similarity, so the table does
# not show which similarity is better.
#
# ## How the training went
#
# Each stage of the vectors model has a row. Stage 1 aligns images with dense captions. Stage 2 aligns them with sparse
# captions, and distils the dense embedding into the sparse one. First check that the scores of right pairs move away
# from those of the hardest wrong pairs.

# %%
keep(training_curves(OUTPUT / "vectors"), "curves.png")

# %% [markdown]
# ## What the model retrieves
#
# The first figure shows three captions and their five best images by the words model. The right image has a frame,
# and its rank follows the caption. The second figure shows two images and their best captions; right ones are green.
#
# Look at the *wrong* results: they share with the query what the model has learned.

# %%
images = of_words.encode_image(test.images, output="features")
texts = of_words.encode_text(test.captions, output="features")
scores, owner = of_words.similarity(images, texts), test.image_of_caption
asked = [int((owner == image).argmax()) for image in (0, 1, 2)]  # the first caption of each image
keep(retrieval_gallery(test.images, test.captions, scores, owner, asked), "images.png")

# %%
keep(retrieval_gallery(test.images, test.captions, scores, owner, [0, 1], direction="i2t"), "captions.png")

# %% [markdown]
# ## Which word meets which patch
#
# The figure shows the score of every patch for each word, with a frame around the word's best patch. The ResNet gives
# 4 × 4 patches of a scene, and each sees more than its own square. A ViT gives 14 × 14 patches of a photo.
#
# Heat shows where a word was *matched*. It does not prove that the thing is there: every word takes some patch, also
# "a" and "the". A word's embedding also depends on its neighbours, so "an" before "orange" has its heat where "orange"
# has it. In one run, "orange" and "yellow" took a patch at their shape and "left" took one at the left. "star", "ring"
# and "right" missed theirs. The model learns colours first.
#
# So look at several images before you trust a map. [What a model sees](../docs/visualize.md#on-real-photos) counts how
# often the hottest patch of "dog" is on the dog. With small models, this is not often enough to trust a single map.

# %%
first = test.records[0]
keep(explain(of_words, first.image, first.captions[0]), "words.png")

# %% [markdown]
# Another similarity draws the same pair. OMIT moves the mass of the patches to the words, and all words have equal
# mass. A map shows where a word's mass comes from; the *bins* take the mass that matches nothing. OMIT has no weights,
# so it can draw any model. This model was not trained with OMIT, so the maps only describe its features.

# %%
keep(explain(of_words, first.image, first.captions[0], similarity=OMIT()), "transport.png")

# %% [markdown]
# ## How well scores separate right pairs from wrong ones
#
# The figure shows all scores of right and wrong pairs: both models with their own similarity, and the words model with
# OMIT, which it was not trained with. The title gives how often a right pair scores higher than a wrong one. 50 % is
# chance, and 99 % still puts one wrong image of a hundred before the right one. The three scales differ.

# %%
vectors = of_vectors.encode_image(test.images), of_vectors.encode_text(test.captions)
views = {
    "words: max-mean": (scores, owner),
    "words: OMIT": (OMIT()(images, texts), owner),
    "vectors: GSSF": (of_vectors.similarity(*vectors), owner),
}
keep(score_distributions(views), "scores.png")

# %% [markdown]
# ## What the metric has learned
#
# The figure shows the blocks of $W$ (GSSF, Fig. 4). They start as the identity, which is cosine. The weights are at the
# left, their difference from the identity is in the middle, and their histogram is at the right.

# %%
keep(metric_weights(of_vectors.similarity_fn), "metric.png")

# %% [markdown]
# A weight on the diagonal tells how much a dimension counts. Other weights tell how much two dimensions of a block mix.
# After so few steps, the weights are near the identity: a metric needs more training than this.
#
# ## What the decoder's tokens add
#
# A sparse caption leaves out most of the image. The decoder reads its words with learnable tokens, and the model adds
# the decoder's output to the pooled embedding (D2S-VSE, Eq. 3). Does this bring the caption nearer to the *dense*
# caption of its image? The figure shows the nearest dense captions without and with the tokens; the own one is green.

# %%
sparse = [record.captions[0] for record in test.records]
own = range(len(sparse))
keep(context_neighbours(of_vectors, sparse[:3], test.dense_captions, own=own[:3], k=2), "context.png")

# %% [markdown]
# Three captions prove nothing, so this cell counts all test images:

# %%
for name, found in zip(("without", "with"), nearest_dense(of_vectors, sparse, test.dense_captions, own), strict=True):
    mean, top = found.ranks.mean(), 100 * (found.ranks <= 10).mean()
    print(f"{name:7} the tokens: mean rank of the own dense caption {mean:.0f}, {top:.0f} % among the first 10")

# %% [markdown]
# On the scenes, after so short a stage 2, the tokens bring captions no nearer to their dense captions than the encoder
# alone. Three drawings would not have shown this. `without` is not the result of a model without a decoder: its
# encoder was trained together with the decoder. To compare, train a model by `stage="align"` (notebook 2).
#
# ## Where to read on
#
# `d2svse explain IMAGE "a sentence" --model MODEL --out map.png` draws the maps from a shell.
#
# - [What a model sees](../docs/visualize.md): how to read each map, and how far to trust it.
# - [Concepts](../docs/concepts.md): dense and sparse, the decoder, pooling and similarity.
