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
# # 1. Quickstart: train a little, encode, search
#
# An image-text model puts pictures and sentences into one space, so that a picture lies near the sentences that
# describe it. This notebook makes such a model, encodes pictures and sentences with it, searches a folder of pictures
# by a sentence, and measures how often the right picture is found.
#
# It needs nothing but the package: it draws its own pictures and trains a small model from random weights, in
# seconds, on the CPU. With a model of your own or from the Hub you would start at *Encode*.

# %%
from pathlib import Path

from transformers import ResNetConfig, logging

from d2svse import D2SVSE, ImageTextDataset, ImageTextIndex, Trainer, TrainingArguments, evaluate
from d2svse.cli.common import print_recalls
from d2svse.demo import TRAINING, build_model, draw_scenes
from d2svse.retrieval import compose_gallery
from d2svse.training.arguments import PRESETS

logging.disable_progress_bar()  # of reading and writing weights

# %% [markdown]
# ## The one path to change
#
# `DATA = None` draws scenes of coloured shapes. For photos give a folder that holds `train.jsonl`, `val.jsonl` and
# `test.jsonl`, with a line for each picture:
#
# ```
# {"image": "photos/a.jpg", "captions": ["A dog runs.", "A dog on grass."], "dense": "A brown dog runs over grass."}
# ```
#
# Image paths start at that folder; `dense` may be left out. Nothing else has to change: with photos the notebook
# takes pretrained backbones (from the Hub, a ViT and a BERT) in place of the small random ones, and the settings that
# this library recommends for photos. That wants a GPU, or patience. `EPOCHS` is the budget: 3 rounds through the
# training pictures are little, for scenes and photos alike.

# %%
DATA = None
EPOCHS = 3
OUTPUT = Path("d2svse-examples/quickstart")  # all that is written lies here

# %%
OUTPUT.mkdir(parents=True, exist_ok=True)
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)
print(f"{len(train)} pictures to train on, {len(val)} to choose the epoch by, {len(test)} to test on")


def keep(picture, name):
    """Write a picture to a file, and give it back for the notebook to show."""
    picture.save(OUTPUT / name)
    return picture


# %% [markdown]
# A picture has several *sparse* captions, which tell a part each, and one *dense* text, which tells everything. Here
# is one of the test pictures with all that is written about it.

# %%
first = test.records[0]
print("\n".join(first.captions))
print("\ndense:", first.dense)
keep(compose_gallery([(first.captions[0], [first.image])]), "first.png")

# %% [markdown]
# ## A model
#
# A model is two backbones, one for pictures and one for sentences, each with a projection into the joint space and a
# pooling that makes one vector of many. On scenes they are built from configurations, with random weights.

# %%
if DATA is None:
    vision = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
    model = build_model(train.captions + train.dense_captions, vision=vision)
    settings = TRAINING | {"per_device_train_batch_size": 32}
else:
    model = D2SVSE.from_backbones("google/vit-base-patch16-224", "google-bert/bert-base-uncased")
    settings = PRESETS["recommended"]
print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} million weights")

# %% [markdown]
# Notebook 2 is about training. Here it is two lines: say what to do (`align` brings pictures and sparse captions
# together), and do it. After each epoch the validation pictures are ranked, and the best epoch's weights are kept.

# %%
chosen = {"num_train_epochs": EPOCHS, "disable_tqdm": True}
args = TrainingArguments(**settings | chosen, stage="align", output_dir=str(OUTPUT / "checkpoints"))
Trainer(model, args, train, val).train()
model.save_pretrained(OUTPUT / "model")

# %% [markdown]
# ## Encode
#
# A saved model is a folder: weights, configuration, tokenizer, image processor. `from_pretrained` takes the folder or
# a name on the Hub.
#
# `encode_image` and `encode_text` give one vector each, of length 1, in the order given, whatever the batch size.
# `similarity` compares all pictures with all sentences, as the model was trained to; here it is the cosine.

# %%
model = D2SVSE.from_pretrained(OUTPUT / "model")
images = model.encode_image(test.images[:4])
texts = model.encode_text([record.captions[0] for record in test.records[:4]])
scores = model.similarity(images, texts)
print("vectors of", images.shape, "and", texts.shape)
print("pictures in rows, their first captions in columns:")
print(scores.round(2))

# %% [markdown]
# In a perfect model the largest number of each row and column stands on the diagonal.
#
# ## Search
#
# An index holds the vectors of many pictures, on the disk. `build` takes a folder, a manifest or a list of paths. A
# search takes sentences, a picture (`images=`), or both.

# %%
index = ImageTextIndex.build(model, test.images, OUTPUT / "index", overwrite=True)
queries = [record.captions[0] for record in test.records[:3]]
answers = index.search(queries, k=5)
for query, hits in zip(queries, answers, strict=True):
    print(query)
    for hit in hits[:2]:
        print(f"  {hit.score:.3f}  {hit.id}")

# %% [markdown]
# Each row below is a query and its five best pictures; a frame marks the picture that the sentence was written for.
# Look at what the others have in common with the query, too: colours and places are learned first, shapes last.

# %%
rows, right = [], []
for record, query, hits in zip(test.records[:3], queries, answers, strict=True):
    found = [hit.id for hit in hits]
    rows.append((query, found))
    right.append([place for place, path in enumerate(found) if path == str(record.image)])
keep(compose_gallery(rows, right=right), "answers.png")

# %% [markdown]
# The same from a shell, with the folders that are there now:
#
# ```
# d2svse search d2svse-examples/quickstart/index "a red circle on a grey background" --gallery answers.html
# ```
#
# ## How good is it?
#
# R@K is the share of queries with a right answer among the first K, in both directions: captions to a picture (I2T)
# and pictures to a caption (T2I). Always look at chance beside it: of n pictures the right one is among the first K
# by luck in K / n of all cases.

# %%
metrics = evaluate(model, test).metrics
chance = {f"{side}_recall_at_{k}": k / len(test) for side in ("i2t", "t2i") for k in (1, 5, 10)}
chance["rsum"] = sum(chance.values())
print_recalls({"chance": chance, "this model": metrics}, f"{len(test)} test pictures, percent")

# %% [markdown]
# On the drawn scenes half of all sentences find their picture among the first ten of a hundred, where chance finds a
# tenth. That is far from good. It shows that the pieces work together, and no more: the model has seen 800 pictures
# three times. `d2svse demo` trains on 4000 scenes for minutes, and [results](../docs/results.md) tells how far that
# goes, and how far photos with pretrained backbones go.
#
# ## Where to read on
#
# - Notebook 2 trains with both stages of D2S-VSE.
# - [Your own photos](../docs/guides/photos.md): the same as commands.
# - [Indexes](../docs/indexing.md): adding and removing pictures, queries of a sentence and a picture, a million
#   pictures.
# - [Evaluation](../docs/evaluation.md): what is counted, and how ties are.
