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
# A recall says how often a model is right. It does not say why. This notebook trains two models and draws what can be
# drawn of them: how the training went, what is found, which word meets which part of a picture, how right and wrong
# pairs score, what a metric has learned, and what the decoder's tokens add.
#
# - The **vectors** model goes through both stages of D2S-VSE and compares one vector with one vector, by GSSF: $s =
#   x^\top (W \odot U) \, y$. It has a metric and a decoder to look at.
# - The **words** model aligns pictures with dense text, then with sparse captions, and compares words with patches:
#   each word $w_l$ takes its best patch $v_k$, $s = \frac{1}{L} \sum_l \max_k v_k^\top (W \odot U) \, w_l$. It can
#   say which word meets which patch. (It has no decoder: that changes the pooled sentence alone, which this score
#   does not look at.)

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

logging.disable_progress_bar()  # of reading and writing weights

# %% [markdown]
# `DATA` is the one path to change: a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, as notebook 1 tells;
# None draws scenes. The budget is the epochs with dense text and with sparse captions. To look at a model that you
# have, put `model = D2SVSE.from_pretrained(...)` in place of the training.

# %%
DATA = None
PRETRAIN_EPOCHS, SPARSE_EPOCHS = 1, 3
OUTPUT = Path("d2svse-examples/looking-inside")  # all that is written lies here

# %%
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)


def train_stages(name, similarity, stages):
    """A model with a similarity, trained through stages of so many epochs."""
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
    """Write a figure to a file, and give it back as a picture for the notebook to show."""
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
print_recalls({"chance": chance, **results}, f"{len(test)} test pictures, percent")

# %% [markdown]
# Both are far above chance on the drawn scenes. The two differ in more than their similarity, so the table does not
# tell which similarity is better.
#
# ## How the training went
#
# A row for each stage of the vectors model. Stage 1 aligns pictures with dense text. Stage 2 aligns them with sparse
# captions, and distils the dense vector into the sparse one. Look first whether right pairs pull away from the
# hardest wrong ones.

# %%
keep(training_curves(OUTPUT / "vectors"), "curves.png")

# %% [markdown]
# ## What is found
#
# Three captions and their five best pictures by the words model; the right one is framed, and its rank stands behind
# the caption. Then the other way round: two pictures and their best captions, the right ones in green.
#
# Look at the *wrong* answers: what they share with the query is what the model has learned.

# %%
images = of_words.encode_image(test.images, output="features")
texts = of_words.encode_text(test.captions, output="features")
scores, owner = of_words.similarity(images, texts), test.image_of_caption
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
# Heat says where a word was *matched*, not that it is there: every word has to take some patch, "a" and "the" too. A
# word's vector has also seen its neighbours, so that "an" before "orange" lights up where "orange" does. In the run
# by which this was written "orange" and "yellow" took a patch at their shape and "left" one at the left; "star",
# "ring" and "right" did not find theirs. Colours are learned first.
#
# So look at several pictures before you believe a map. [What a model sees](../docs/visualize.md#on-real-photos)
# counts how often the hottest patch of "dog" lies on the dog: with the small models there, not often enough to trust
# a single map.

# %%
first = test.records[0]
keep(explain(of_words, first.image, first.captions[0]), "words.png")

# %% [markdown]
# The same pair seen by another similarity. OMIT moves the mass of the patches to the words, all words the same mass.
# A map is where a word's mass comes from, and the *bins* take what matches nothing. (OMIT has no weights, so any
# model can be looked at with it. This one was not trained with it, so take it as a look at the features.)

# %%
keep(explain(of_words, first.image, first.captions[0], similarity=OMIT()), "transport.png")

# %% [markdown]
# ## How far right pairs stand from wrong ones
#
# All scores of right and of wrong pairs, of both models by their own similarity, and of the words model by OMIT,
# which it was not trained with. The share in the title is how often a right pair scores higher than a wrong one: 50 %
# is chance, and 99 % still leaves one wrong picture of a hundred before the right one. The three scales differ.

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
# The blocks of $W$ (GSSF, Fig. 4). They start as the identity, which is cosine. Left the weights, in the middle what
# was learned, the weights less the identity, right their histogram.

# %%
keep(metric_weights(of_vectors.similarity_fn), "metric.png")

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
keep(context_neighbours(of_vectors, sparse[:3], test.dense_captions, own=own[:3], k=2), "context.png")

# %% [markdown]
# Three sentences prove nothing, so the same for all test pictures:

# %%
for name, found in zip(("without", "with"), nearest_dense(of_vectors, sparse, test.dense_captions, own), strict=True):
    mean, top = found.ranks.mean(), 100 * (found.ranks <= 10).mean()
    print(f"{name:7} the tokens: own dense text at place {mean:.0f} in the mean, {top:.0f} % among the first 10")

# %% [markdown]
# On the scenes, after so short a stage 2, the tokens bring sentences no nearer to their dense text than the encoder
# alone. That is worth knowing: the drawing above would have shown it only by chance. `without` is not what a model
# without a decoder would give, though. The encoder has been trained together with the decoder, to be completed by it;
# for the other train one by `stage="align"` (notebook 2).
#
# ## Where to read on
#
# `d2svse explain PICTURE "a sentence" --model MODEL --out map.png` draws the maps from a shell.
#
# - [What a model sees](../docs/visualize.md): how to read each map, and how far to trust it.
# - [Concepts](../docs/concepts.md): dense and sparse, the decoder, pooling and similarity.
