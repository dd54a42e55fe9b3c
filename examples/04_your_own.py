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
# A similarity is a class with a name and one method. A loss is a class with one method. Neither needs a change in the
# package. This notebook writes one of each, checks them on random numbers, and trains with them.

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
# `DATA` is the one path to change: a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, see notebook 1; None
# draws scenes. `EPOCHS` is the number of epochs of each training.

# %%
DATA = None
EPOCHS = 2
OUTPUT = Path("d2svse-examples/your-own")  # folder of all written files

# %% [markdown]
# ## A similarity
#
# The idea is to score the whole image against the whole text, and each word against its best patch, in learned shares:
#
# $$s = g \, x^\top y + (1 - g) \, \frac{1}{L} \sum_{l=1}^{L} \max_k v_k^\top w_l, \qquad g = \sigma(a),$$
#
# Here $x$ and $y$ are the pooled vectors, $v_k$ the patches, and $w_l$ the $L$ words, all of length 1. One number $a$
# is learned.
#
# `FragmentSimilarity` does the common work. It normalises, scores images and texts a tile at a time to bound memory,
# and computes the gradient tile by tile. The class must only score a tile. It gets `products`, the cosines of all
# patches with all words, `(n_images, n_patches, n_texts, n_words)`. Texts differ in length, so some of the words are
# padding: **mask them**.
#
# A similarity of pooled vectors inherits from `Similarity` and has the method `score`; see the twenty
# lines in [similarities](../docs/similarities.md#your-own-in-20-lines).


# %%
@register_similarity("whole-and-words")
class WholeAndWords(FragmentSimilarity):
    """Score by the cosine of the pooled vectors and the mean of the words' best patches, in learned shares."""

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
# The checks use random features and no model. Three checks find most mistakes:
#
# 1. A slow double loop of the formula returns equal scores.
# 2. Padding does not change a score: a text has equal scores alone and beside a longer text.
# 3. The size of the tiles does not change a score.

# %%
torch.manual_seed(0)
mask = torch.tensor([[True] * 6, [True, True, True, False, False, False]])  # the second text has three words
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

own.max_memory = 1  # one image and one text a tile
assert torch.allclose(own(images, texts), scores, atol=1e-6), "tiles"
print("all three hold")

# %% [markdown]
# ## A loss
#
# A ranking loss gets the scores of a batch, with images in rows and texts in columns, and a mask of the negatives. Pair
# $i$ is on the diagonal. Two captions of one image are not negatives of each other, so use the mask and not "all
# entries except the diagonal". This example is a sigmoid loss (SigLIP, ICCV 2023, Eq. 1), in which each pair is a
# yes-or-no question:
#
# $$L = -\frac{1}{n} \sum_{ij} \log \sigma\left(z_{ij} \, (s_{ij} / \tau + b)\right),$$
#
# Here $z_{ij} = 1$ for right pairs and $-1$ for negatives. The paper learns $\tau$ and $b$. In this class they are
# constants, because a loss with its own parameters is refused: the model would not save them. (The package's own loss
# `sigmoid` can learn them, as the model's temperature and bias.)


# %%
class SigmoidLoss(RankingLoss):
    """Classify each pair as right or wrong."""

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
owner = torch.tensor([0, 0, 1, 2])  # pairs 0 and 1 are of one image
by_hand = 0.0
for i in range(4):
    for j in range(4):
        if i == j or owner[i] != owner[j]:
            sign = 1 if i == j else -1
            by_hand -= F.logsigmoid(sign * (scores[i, j] / 0.07 - 5.0)) / 4
assert torch.allclose(loss(scores, owner), by_hand), "the formula"

changed = scores.clone()
changed[0, 1] += 10  # a second caption of this image
assert loss(changed, owner) == loss(scores, owner), "no negatives within an image"
print("both hold")

# %% [markdown]
# ## Train with them
#
# The model takes the similarity by its name, and the trainer takes the loss as an object. For comparison, the
# similarity is also trained with InfoNCE, the loss of the other notebooks.

# %%
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)


def train_own(name, loss=None):
    """Return a model with the similarity above, trained with a loss; None is InfoNCE."""
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
print_recalls(results, f"whole-and-words on {len(test)} test images, percent")
for name, model in models.items():
    print(f"{name}: the whole counts {100 * model.similarity_fn.share.sigmoid().item():.0f} %, the words the rest")

# %% [markdown]
# Both are well above chance on the scenes, so both losses work. They are not tuned: search the temperature, the bias
# and the learning rate of a new loss. Fifty steps do not show how good a loss becomes. If a new loss does not learn,
# look at `loss_if_collapsed`, `embedding_std` and `active_share` in the log, which
# [training](../docs/training.md#watching) explains. The learned share changes little in so few steps.
#
# ## Save and load
#
# The model is saved with the name, the arguments and the learned share of the similarity. Import the class before you
# load the model, or declare an entry point, which commands know too:
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
#   distillation losses, and the statistics in the log.
# - [Similarities](../docs/similarities.md): `fold` for bilinear scores.
