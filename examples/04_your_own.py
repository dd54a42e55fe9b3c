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
# # 4. Your own similarity, your own loss
#
# A similarity is a class with a name and one method; a loss is a class with one method. Neither needs a change to the
# package. This notebook writes one of each, checks them on random numbers before any training, and trains with them.

# %%
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetConfig, logging

from d2svse import (
    D2SVSE,
    Features,
    ImageTextDataset,
    Trainer,
    TrainingArguments,
    build_similarity,
    evaluate,
    register_similarity,
)
from d2svse.cli.common import print_recalls
from d2svse.demo import TRAINING, build_model, draw_scenes
from d2svse.losses import RankingLoss
from d2svse.similarity import FragmentSimilarity
from d2svse.training.arguments import PRESETS

logging.disable_progress_bar()  # of reading and writing weights

# %% [markdown]
# `DATA` is the one path to change: a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, as notebook 1 tells;
# None draws scenes. `EPOCHS` is the budget of each training.

# %%
DATA = None
EPOCHS = 2
OUTPUT = Path("d2svse-examples/your-own")  # all that is written lies here

# %% [markdown]
# ## A similarity
#
# The idea: the whole picture against the whole sentence, and each word against its best patch, in shares that are
# learned,
#
# $$s = g \, x^\top y + (1 - g) \, \frac{1}{L} \sum_{l=1}^{L} \max_k v_k^\top w_l, \qquad g = \sigma(a),$$
#
# with the pooled vectors $x$, $y$, the patches $v_k$, the $L$ words $w_l$, all of length 1, and one learned number
# $a$.
#
# `FragmentSimilarity` does what is tedious: it normalises, takes pictures and sentences a tile at a time so that
# memory stays bounded, and computes the gradient tile by tile. What is left is the score of a tile. It is given
# `products`, the cosines of all patches with all words, `(n_images, n_patches, n_texts, n_words)`. Sentences are of
# different length, so some of the words are padding: **mask them**.
#
# (For a score of the pooled vectors alone inherit from `Similarity` and write `score`: twenty lines in
# [similarities](../docs/similarities.md#your-own-in-20-lines).)


# %%
@register_similarity("whole-and-words")
class WholeAndWords(FragmentSimilarity):
    """The cosine of the pooled vectors and the mean of the words' best patches, in learned shares."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(start))  # before the sigmoid

    def score_tile(self, images, texts, products):
        usable = images.mask[:, :, None, None] & texts.mask
        best = products.masked_fill(~usable, float("-inf")).amax(1)  # (n_images, n_texts, n_words)
        words = best.masked_fill(~texts.mask, 0).sum(-1) / texts.mask.sum(-1)
        whole = images.pooled @ texts.pooled.T
        share = self.share.sigmoid()
        return share * whole + (1 - share) * words


# %% [markdown]
# ### Check it before you train
#
# On random features, without a model. Three checks find most mistakes:
#
# 1. a slow double loop, straight from the formula, gives the same;
# 2. padding changes no score: a sentence scores the same alone as beside a longer one;
# 3. the size of the tiles changes nothing.

# %%
torch.manual_seed(0)
mask = torch.tensor([[True] * 6, [True, True, True, False, False, False]])  # the second sentence has three words
images = Features(torch.randn(3, 16), torch.randn(3, 9, 16))
texts = Features(torch.randn(2, 16), torch.randn(2, 6, 16), mask)
own = build_similarity({"name": "whole-and-words", "start": 0.5})
scores = own(images, texts)

by_hand = torch.zeros(3, 2)
g = torch.tensor(0.5).sigmoid()
for i in range(3):
    for j in range(2):
        length = int(mask[j].sum())
        best = [max(F.cosine_similarity(images.tokens[i], texts.tokens[j, w][None])) for w in range(length)]
        whole = F.cosine_similarity(images.pooled[i], texts.pooled[j], dim=0)
        by_hand[i, j] = g * whole + (1 - g) * sum(best) / length
assert torch.allclose(scores, by_hand, atol=1e-6), "the formula"

alone = Features(texts.pooled[1:], texts.tokens[1:, :3], mask[1:, :3])
assert torch.allclose(scores[:, 1:], own(images, alone), atol=1e-6), "padding"

own.max_memory = 1  # one picture and one sentence a tile
assert torch.allclose(own(images, texts), scores, atol=1e-6), "tiles"
print("all three hold")

# %% [markdown]
# ## A loss
#
# A ranking loss is given the scores of a batch, pictures in rows, texts in columns, pair $i$ on the diagonal, and
# which entries are negatives. Two captions of one picture are no negatives of each other, so take the mask and not
# "all but the diagonal". This one is the sigmoid loss (SigLIP, ICCV 2023, Eq. 1): each pair is a yes-or-no question
# of its own,
#
# $$L = -\frac{1}{n} \sum_{ij} \log \sigma\left(z_{ij} \, (s_{ij} / \tau + b)\right),$$
#
# with $z_{ij} = 1$ for right pairs and $-1$ for negatives. The paper learns $\tau$ and $b$; here they are constants,
# since a loss with weights of its own is refused: they would not be saved with the model.


# %%
class SigmoidLoss(RankingLoss):
    """Every pair is right or wrong, each for itself."""

    def __init__(self, temperature: float = 0.07, bias: float = -5.0) -> None:
        super().__init__()
        self.temperature, self.bias = temperature, bias

    def compute(self, scores, negatives):
        logits = scores / self.temperature + self.bias
        right = F.logsigmoid(logits.diagonal()).sum()
        wrong = F.logsigmoid(-logits).masked_fill(~negatives, 0).sum()
        return -(right + wrong) / len(scores)


# %%
loss = SigmoidLoss()
scores = torch.randn(4, 4)
owner = torch.tensor([0, 0, 1, 2])  # pairs 0 and 1 are of one picture
by_hand = 0.0
for i in range(4):
    for j in range(4):
        if i == j or owner[i] != owner[j]:
            sign = 1 if i == j else -1
            by_hand -= F.logsigmoid(sign * (scores[i, j] / 0.07 - 5.0)) / 4
assert torch.allclose(loss(scores, owner), by_hand), "the formula"

changed = scores.clone()
changed[0, 1] += 10  # a second caption of the same picture
assert loss(changed, owner) == loss(scores, owner), "no negatives within a picture"
print("both hold")

# %% [markdown]
# ## Train with them
#
# The similarity goes by its name into the model, the loss as an object into the trainer. For comparison the
# similarity is trained with InfoNCE, too, the loss that the other notebooks take.

# %%
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)


def train_own(name, loss=None):
    """A model with the similarity above, trained with a loss; without one with InfoNCE."""
    if DATA is None:
        vision = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
        words = train.captions + train.dense_captions
        model = build_model(words, vision=vision, similarity={"name": "whole-and-words"})
        settings = TRAINING | {"per_device_train_batch_size": 32}
    else:
        backbones = "google/vit-base-patch16-224", "google-bert/bert-base-uncased"
        model = D2SVSE.from_backbones(*backbones, similarity={"name": "whole-and-words"})
        settings = PRESETS["recommended"]
    chosen = {"num_train_epochs": EPOCHS, "disable_tqdm": True}
    args = TrainingArguments(**settings | chosen, stage="align", output_dir=str(OUTPUT / "run" / name))
    Trainer(model, args, train, val, loss=loss).train()
    return model.eval()


# %%
models = {"InfoNCE": train_own("infonce"), "the sigmoid loss": train_own("sigmoid", SigmoidLoss())}

# %%
chance = {f"{side}_recall_at_{k}": k / len(test) for side in ("i2t", "t2i") for k in (1, 5, 10)}
chance["rsum"] = sum(chance.values())
results = {"chance": chance} | {name: evaluate(model, test).metrics for name, model in models.items()}
print_recalls(results, f"whole-and-words on {len(test)} test pictures, percent")
for name, model in models.items():
    print(f"{name}: the whole counts {100 * model.similarity_fn.share.sigmoid().item():.0f} %, the words the rest")

# %% [markdown]
# Both are well above chance on the scenes, so both give a gradient that teaches. They are not tuned: the temperature,
# the bias and the learning rate of a new loss want a search, and fifty steps tell nothing about where a loss ends.
# What to look at when a new one does not learn: `loss_if_collapsed`, `embedding_std` and `active_share` in the log,
# which [training](../docs/training.md#watching) explains. The learned share hardly moves in so few steps.
#
# ## Save and load
#
# The name, the arguments and the learned share are saved with the model. Who loads it must have imported the class
# before, or have it by an entry point, which commands know, too:
#
# ```toml
# [project.entry-points."d2svse.similarities"]
# whole-and-words = "my_package.similarity:WholeAndWords"
# ```

# %%
model = models["InfoNCE"]
model.save_pretrained(OUTPUT / "model")
loaded = D2SVSE.from_pretrained(OUTPUT / "model")
assert isinstance(loaded.similarity_fn, WholeAndWords)
assert loaded.similarity_fn.share == model.similarity_fn.share
print("loaded:", loaded.config.similarity)

# %% [markdown]
# ## Where to read on
#
# - [Add a similarity](../docs/guides/add-a-similarity.md) and [add a loss](../docs/guides/add-a-loss.md): schedules,
#   distillation losses, what the log counts.
# - [Similarities](../docs/similarities.md): `fold` for bilinear scores.
