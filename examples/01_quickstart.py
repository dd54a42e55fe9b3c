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
# # 1. Quickstart: train, encode, search
#
# An image-text model puts images and texts into one space. An image is then near the texts that describe it. This
# notebook trains such a model, encodes images and texts, searches a folder of images by a text, and measures how often
# it finds the right image.
#
# It needs only the package. It draws its own images and trains a small model from random weights, in seconds, on the
# CPU. If you have a trained model, start at *Encode*.

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
# `DATA = None` draws scenes of coloured shapes. For photos, give a folder with `train.jsonl`, `val.jsonl` and
# `test.jsonl`. Each file has a line for each image:
#
# ```
# {"image": "photos/a.jpg", "captions": ["A dog runs.", "A dog on grass."], "dense": "A brown dog runs over grass."}
# ```
#
# Image paths start from that folder, and `dense` may be missing. With photos, the notebook uses pretrained backbones
# from the Hub (a ViT and a BERT) instead of small random ones, and the recommended settings for photos. That needs a
# GPU or much time. `EPOCHS` is the number of epochs; 3 epochs are few, for scenes and for photos.

# %%
DATA = None
EPOCHS = 3
OUTPUT = Path("d2svse-examples/quickstart")  # folder of all written files

# %%
OUTPUT.mkdir(parents=True, exist_ok=True)
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)
print(f"{len(train)} images to train on, {len(val)} to choose the epoch, {len(test)} to test")


def keep(image, name):
    """Write an image to a file, and return it for the notebook to show."""
    image.save(OUTPUT / name)
    return image


# %% [markdown]
# An image has several *sparse* captions, each of which describes a part, and one *dense* caption, which describes
# everything. Here is one of the test images with all its captions.

# %%
first = test.records[0]
print("\n".join(first.captions))
print("\ndense:", first.dense)
keep(compose_gallery([(first.captions[0], [first.image])]), "first.png")

# %% [markdown]
# ## A model
#
# A model has two backbones, one for images and one for texts. Each has a projection into the joint space and a pooling
# that makes one vector of many. For scenes, the backbones are built from configurations, with random weights.

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
# Notebook 2 is about training. Here, training takes two lines: the arguments and the call. The stage `align` aligns
# images with sparse captions. Each epoch ends with an evaluation on the validation set, and training keeps the weights
# of the best epoch.

# %%
chosen = {"num_train_epochs": EPOCHS, "disable_tqdm": True}
args = TrainingArguments(**settings | chosen, stage="align", output_dir=str(OUTPUT / "checkpoints"))
Trainer(model, args, train, val).train()
model.save_pretrained(OUTPUT / "model")

# %% [markdown]
# ## Encode
#
# A saved model is a folder with weights, configuration, tokenizer and image processor. `from_pretrained` reads the
# folder, or a model on the Hub by its name.
#
# `encode_image` and `encode_text` return one vector of length 1 for each input, in the order of the inputs. The batch
# size does not change them. `similarity` scores all images against all texts by the model's similarity, here cosine.

# %%
model = D2SVSE.from_pretrained(OUTPUT / "model")
images = model.encode_image(test.images[:4])
texts = model.encode_text([record.captions[0] for record in test.records[:4]])
scores = model.similarity(images, texts)
print("vectors of", images.shape, "and", texts.shape)
print("images in rows, their first captions in columns:")
print(scores.round(2))

# %% [markdown]
# In a perfect model, the largest number of each row and column is on the diagonal.
#
# ## Search
#
# An index stores the vectors of many images on the disk. `build` takes a folder, a manifest or a list of paths. A
# search takes texts, an image (`images=`), or both.

# %%
index = ImageTextIndex.build(model, test.images, OUTPUT / "index", overwrite=True)
queries = [record.captions[0] for record in test.records[:3]]
answers = index.search(queries, k=5)
for query, hits in zip(queries, answers, strict=True):
    print(query)
    for hit in hits[:2]:
        print(f"  {hit.score:.3f}  {hit.id}")

# %% [markdown]
# Each row below shows a query and its five best images. A frame marks the image of the caption. Compare the other
# images with the query, too: the model learns colours and positions first, and shapes last.

# %%
rows, right = [], []
for record, query, hits in zip(test.records[:3], queries, answers, strict=True):
    found = [hit.id for hit in hits]
    rows.append((query, found))
    right.append([position for position, path in enumerate(found) if path == str(record.image)])
keep(compose_gallery(rows, right=right), "answers.png")

# %% [markdown]
# This command searches the same index:
#
# ```
# d2svse search d2svse-examples/quickstart/index "a red circle on a grey background" --gallery answers.html
# ```
#
# ## How good is it?
#
# R@K is the share of queries with a right answer among the first K. There are two directions: captions of an image
# (I2T) and images of a caption (T2I). Always compare with chance: among n images, the right one is among the first K by
# chance in K / n of all cases.

# %%
metrics = evaluate(model, test).metrics
chance = {f"{side}_recall_at_{k}": k / len(test) for side in ("i2t", "t2i") for k in (1, 5, 10)}
chance["rsum"] = sum(chance.values())
print_recalls({"chance": chance, "this model": metrics}, f"{len(test)} test images, percent")

# %% [markdown]
# On the drawn scenes, half of all captions find their image among the first ten of a hundred; chance finds a tenth.
# That is not a good model, because it has seen 800 images three times. It shows that all parts work together. `d2svse
# demo` trains on 4000 scenes for minutes. [Results](../docs/results.md) has its figures, and those of photos with
# pretrained backbones.
#
# ## Where to read on
#
# - Notebook 2 trains with both stages of D2S-VSE.
# - [Your own photos](../docs/guides/photos.md): these steps as commands.
# - [Indexes](../docs/indexing.md): adding and removing images, queries of a text and an image, a million images.
# - [Evaluation](../docs/evaluation.md): the metrics, and how ties count.
