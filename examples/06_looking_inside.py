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
# A recall says how often a model is right. It does not say why. This notebook trains one model through both stages
# and draws what can be drawn of it: which word meets which part of a picture, how right and wrong pairs score, what
# the metric has learned, how the training went, what the decoder's tokens add, and what is found.
#
# The model compares words with patches, by a metric that is learned, so that one model has something to show
# everywhere: **max-mean** takes for each word $w_l$ its best patch $v_k$, and the mean over the $L$ words,
#
# $$s = \frac{1}{L} \sum_l \max_k \, v_k^\top (W \odot U) \, w_l,$$
#
# with GSSF's block-diagonal metric $W \odot U$ between a patch and a word.

# %%
from pathlib import Path

from transformers import ResNetConfig, logging

from d2svse import D2SVSE, ImageTextDataset, Trainer, TrainingArguments, evaluate
from d2svse.cli.common import print_recalls
from d2svse.demo import TRAINING, build_model, draw_scenes
from d2svse.similarity import OMIT, Cosine
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

# %matplotlib inline
logging.disable_progress_bar()  # of reading and writing weights

# %% [markdown]
# `DATA` is the one path to change: a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, as notebook 1 tells;
# None draws scenes. The budget are the epochs of each stage. To look at a model that you have, put `model =
# D2SVSE.from_pretrained(...)` in place of the training.

# %%
DATA = None
PRETRAIN_EPOCHS, DISTILL_EPOCHS = 1, 3
OUTPUT = Path("d2svse-examples/looking-inside")  # all that is written lies here

# %%
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)
similarity = {"name": "max-mean", "direction": "t2i", "metric": "block-diagonal"}
if DATA is None:
    vision = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
    model = build_model(train.captions + train.dense_captions, vision=vision, similarity=similarity)
    settings = TRAINING | {"per_device_train_batch_size": 32}
else:
    backbones = "google/vit-base-patch16-224", "google-bert/bert-base-uncased"
    model = D2SVSE.from_backbones(*backbones, similarity=similarity)
    settings = PRESETS["recommended"]

for stage, epochs in (("pretrain", PRETRAIN_EPOCHS), ("distill", DISTILL_EPOCHS)):
    chosen = {"num_train_epochs": epochs, "logging_steps": 0.05, "disable_tqdm": True}
    args = TrainingArguments(**settings | chosen, stage=stage, output_dir=str(OUTPUT / "run" / stage))
    Trainer(model, args, train, val).train()
model.eval()


def keep(figure, name):
    """Write a figure to a file, and give it back for the notebook to show."""
    figure.savefig(OUTPUT / name)
    return figure


# %%
chance = {f"{side}_recall_at_{k}": k / len(test) for side in ("i2t", "t2i") for k in (1, 5, 10)}
chance["rsum"] = sum(chance.values())
print_recalls({"chance": chance, "this model": evaluate(model, test)}, f"{len(test)} test pictures, percent")

# %% [markdown]
# ## How the training went
#
# A row for each stage. Stage 1 aligns pictures with dense text. Stage 2 aligns them with sparse captions, and distils
# the dense vector into the sparse one. Look first whether right pairs pull away from the hardest wrong ones.

# %%
keep(training_curves(OUTPUT / "run"), "curves.png")

# %% [markdown]
# ## What is found
#
# Three captions and their five best pictures; the right one is framed, and its rank stands behind the caption. Then
# the other way round: two pictures and their best captions, the right ones in green.
#
# Look at the *wrong* answers: what they share with the query is what the model has learned.

# %%
images = model.encode_image(test.images, output="features")
texts = model.encode_text(test.captions, output="features")
scores, owner = model.similarity(images, texts), test.image_of_caption
asked = [int((owner == picture).argmax()) for picture in (0, 1, 2)]  # the first caption of each
keep(retrieval_gallery(test.images, test.captions, scores, owner, asked), "pictures.png")

# %%
keep(retrieval_gallery(test.images, test.captions, scores, owner, [0, 1], direction="i2t"), "sentences.png")

# %% [markdown]
# ## Which word meets which patch
#
# For each word the score of every patch. The frame is the patch that the word takes. The ResNet gives 4 × 4 patches
# for a scene, each of which has seen more than its own square; a ViT gives 14 × 14 for a photo.
#
# Heat says where a word was *matched*, not that it is there: every word has to take some patch, "a" and "the" too. So
# compare a word with its own lowest patch, and several pictures, before you believe a map. [What a model
# sees](../docs/visualize.md#on-real-photos) counts how often the hottest patch of "dog" lies on the dog: with the
# small models there, not often enough to trust a single map.

# %%
first = test.records[0]
keep(explain(model, first.image, first.captions[0]), "words.png")

# %% [markdown]
# The same pair seen by another similarity. OMIT moves the mass of the patches to the words, all words the same mass.
# A map is where a word's mass comes from, and the *bins* take what matches nothing. (OMIT has no weights, so any
# model can be looked at with it. This one was not trained with it, so take it as a look at the features.)

# %%
keep(explain(model, first.image, first.captions[0], similarity=OMIT()), "transport.png")

# %% [markdown]
# ## How far right pairs stand from wrong ones
#
# All scores of right and of wrong pairs, by the model's own similarity, and by two others on the same features. The
# share in the title is how often a right pair scores higher than a wrong one: 50 % is chance, and 100 % is needed for
# perfect ranks. The three scales differ.

# %%
views = {"max-mean (trained with)": model.similarity_fn, "cosine of the pooled": Cosine(), "OMIT": OMIT()}
views = {name: (one(images, texts).detach(), owner) for name, one in views.items()}
keep(score_distributions(views), "scores.png")

# %% [markdown]
# Only the first was trained to rank. In stage 2 the pooled vectors are trained by the distillation term, too, which
# is what the second panel sees.
#
# ## What the metric has learned
#
# The blocks of $W$ (GSSF, Fig. 4). They start as the identity, which is cosine. Left the weights, in the middle what
# was learned, the weights less the identity, right their histogram.

# %%
keep(metric_weights(model.similarity_fn), "metric.png")

# %% [markdown]
# Weights on the diagonal say how much a dimension counts, the others how much two dimensions of a block mix. After so
# few steps they lie near the identity: a metric needs more training than this to say much.
#
# ## What the decoder's tokens add
#
# A sparse sentence leaves most of the picture out. The decoder reads its words with learnable tokens, and its output
# is added to the pooled sentence (D2S-VSE, Eq. 3). Does that bring it nearer to the *dense* text of its picture?
# Below, each sentence with the nearest dense texts without and with the tokens, its own in green.

# %%
sparse = [record.captions[0] for record in test.records]
own = range(len(sparse))
keep(context_neighbours(model, sparse[:3], test.dense_captions, own=own[:3], k=2), "context.png")

# %% [markdown]
# Three sentences prove nothing, so the same for all test pictures:

# %%
for name, found in zip(("without", "with"), nearest_dense(model, sparse, test.dense_captions, own), strict=True):
    mean, top = found.ranks.mean(), 100 * (found.ranks <= 10).mean()
    print(f"{name:7} the tokens: own dense text at place {mean:.0f} in the mean, {top:.0f} % among the first 10")

# %% [markdown]
# `without` is not the sentence's vector before stage 2: the encoder has been trained together with the decoder, to be
# completed by it. The figures tell how the work is shared between them, not what a model without decoder would do.
# For that train one by `stage="align"` (notebook 2).
#
# ## Where to read on
#
# `d2svse explain PICTURE "a sentence" --model MODEL --out map.png` draws the maps from a shell.
#
# - [What a model sees](../docs/visualize.md): how to read each map, and how far to trust it.
# - [Concepts](../docs/concepts.md): dense and sparse, the decoder, pooling and similarity.
