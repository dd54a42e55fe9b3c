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
# # 5. From a published checkpoint to an evaluation
#
# The published D2S-VSE code saves its models as `.pth` files. This library reads them, evaluates them as the
# published code does, converts them to model folders, and writes them back.
#
# The notebook needs no download: it trains a small model of the published architecture (a ViT and a BERT, the
# context decoder, cosine) and writes it in the published format. All further steps are the same as with a real file.
# If you have one, give its path instead of `published` below.

# %%
import argparse
from pathlib import Path

import torch
from transformers import ViTConfig, logging

from d2svse import D2SVSE, D2SVSEProcessor, ImageTextDataset, Trainer, TrainingArguments
from d2svse.cli.common import print_recalls
from d2svse.demo import TRAINING, build_model, draw_scenes
from d2svse.models import D2SVSEImageProcessorPil
from d2svse.published import convert_published, load_published, write_published
from d2svse.retrieval import PROTOCOLS, evaluate
from d2svse.training.arguments import PRESETS

logging.disable_progress_bar()  # of reading and writing weights

# %% [markdown]
# `DATA` is the only path to change: a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, see notebook 1. None
# draws scenes. The budget is the number of epochs of each stage.

# %%
DATA = None
PRETRAIN_EPOCHS, DISTILL_EPOCHS = 1, 2
OUTPUT = Path("d2svse-examples/published")  # all output goes here

# %%
data = Path(DATA) if DATA else draw_scenes(OUTPUT / "scenes", num_train=800, num_test=100)
train, val, test = (
    ImageTextDataset.from_manifest(data / f"{split}.jsonl", dense="auto") for split in ("train", "val", "test")
)

# %% [markdown]
# ## Make a checkpoint
#
# The published format has ViT or Swin with BERT, attention heads 64 wide, pooling by GPO, a decoder with its tokens
# after the words and without positions, and cosine. Images are prepared in one way: bilinear resize to a square
# without anti-aliasing, then ImageNet's mean and deviation.

# %%
if DATA is None:
    vision = ViTConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256, image_size=64, patch_size=16
    )
    model = build_model(train.captions + train.dense_captions, vision=vision, text_heads=2)
    settings = TRAINING | {"per_device_train_batch_size": 32}
else:
    model = D2SVSE.from_backbones("google/vit-base-patch16-224", "google-bert/bert-base-uncased")
    settings = PRESETS["recommended"]
side, tokenizer = model.config.vision_config.image_size, model.processor.tokenizer
image_processor = D2SVSEImageProcessorPil(size={"height": side, "width": side})
model.processor = D2SVSEProcessor(image_processor, tokenizer, max_length=model.processor.max_length)

published_decoder = {"token_placement": "postfix", "decoder_positions": False, "decoder_heads": 4}
for stage, epochs in (("pretrain", PRETRAIN_EPOCHS), ("distill", DISTILL_EPOCHS)):
    chosen = {**published_decoder, "num_train_epochs": epochs, "disable_tqdm": True}
    args = TrainingArguments(**settings | chosen, stage=stage, output_dir=str(OUTPUT / "run" / stage))
    Trainer(model, args, train, val).train()
model.eval().save_pretrained(OUTPUT / "trained")

published = OUTPUT / "published.pth"
write_published(OUTPUT / "trained", published)
print(f"{published}: {published.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# The three warnings are correct. The teacher of stage 2 was not kept, because search does not need it. This library's
# decoder ignores padded words and the published one does not, and its output is added as it is (see below).
#
# ## Look into the file
#
# The file holds a dictionary: the tensors under `model`, the options of the training under `opt`. A `.pth` file is a
# pickle, and a pickle can run code when it is opened. `load_published` opens it safely: it refuses everything except
# tensors, plain values and `argparse.Namespace`, and the error gives the name. The same in a few lines:


# %%
def read(path):
    """The content of a published file, safely."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


content = read(published)
print("options:", vars(content["opt"]))
for name in ("img_enc.image_encoder.fc.weight", "txt_enc.fc.weight", "prompt_learner.prompt_tokens"):
    print(f"{name:34} {tuple(content['model'][name].shape)}")

# %% [markdown]
# ## Load it
#
# The architecture comes from the shapes of the tensors, and from options for what shapes do not contain. The file has
# no tokenizer: give one, or bert-base-uncased is loaded from the Hub.
#
# The paper and the published code differ in the last step of a text's embedding. By default the model does the same
# as the **published evaluation**: the decoder's output is L2-normalised before it is added, and the decoder sees
# padded words. The **paper** adds the raw output (Eq. 3): `fusion="sum"`. `mask_padding=True` hides padding, so the
# vector of a text does not depend on its batch. With both options, the loaded model equals the one trained here.

# %%
as_published = load_published(published, tokenizer=tokenizer).to(model.device)
as_trained = load_published(published, tokenizer=tokenizer, fusion="sum", mask_padding=True).to(model.device)

# %% [markdown]
# ## Convert it
#
# A conversion makes a model folder: safetensors, configuration, tokenizer, image processor. The folder loads fast and
# runs no code, and all other commands take it. (`d2svse convert published FILE.pth FOLDER` does the same.)

# %%
convert_published(published, OUTPUT / "converted", tokenizer=tokenizer)
converted = D2SVSE.from_pretrained(OUTPUT / "converted").to(model.device)

# %% [markdown]
# ## Evaluate
#
# A protocol fixes the test set and how it is ranked. The result contains the name of the protocol, so that only
# results of one protocol are compared.

# %%
for protocol in PROTOCOLS.values():
    print(f"{protocol.name:13} {protocol.about}")

# %% [markdown]
# The protocol of your own test set is `custom`. `"flickr30k-1k"` would check that the data are Flickr30K's 1000 test
# images.

# %%
candidates = {
    "trained here": model,
    "loaded, paper's way": as_trained,
    "loaded, published way": as_published,
    "converted": converted,
}
evaluations = {name: evaluate(one, test) for name, one in candidates.items()}
chance = {f"{side}_recall_at_{k}": k / len(test) for side in ("i2t", "t2i") for k in (1, 5, 10)}
chance["rsum"] = sum(chance.values())
table = {name: evaluation.metrics for name, evaluation in evaluations.items()}
print_recalls({"chance": chance, **table}, f"protocol custom, {len(test)} test images, percent")

# %% [markdown]
# Every score must agree, not only the table: the model loaded in the paper's way with the trained model, and the
# converted folder with the file.


# %%
def score_all(one):
    images = one.encode_image(test.images, convert_to_tensor=True)
    return one.similarity(images, one.encode_text(test.captions, convert_to_tensor=True))


scores = {name: score_all(one) for name, one in candidates.items()}
same = (scores["trained here"] - scores["loaded, paper's way"]).abs().max()
converted_same = (scores["loaded, published way"] - scores["converted"]).abs().max()
other = (scores["trained here"] - scores["loaded, published way"]).abs().max()
assert same < 1e-4
assert converted_same < 1e-5
print(f"largest difference of a score: trained and loaded {same:.1e}, file and converted folder {converted_same:.1e}")
print(f"the paper's way and the published way: {other:.2f}")

# %% [markdown]
# ## And back
#
# A converted folder is written back to the published format bit by bit, including the tensors that the published
# model never uses.

# %%
write_published(OUTPUT / "converted", OUTPUT / "back.pth")
back = read(OUTPUT / "back.pth")
assert list(back["model"]) == list(content["model"])
assert all(torch.equal(back["model"][name], tensor) for name, tensor in content["model"].items())
print(len(back["model"]), "tensors, all equal")

# %% [markdown]
# The file, the folder and the model give the same scores. The small ViT was trained for 75 steps from random weights:
# it ranks above chance, and no better than that. The notebook does not reproduce the recalls of the paper, because the
# published weights were not available when it was written.
#
# ## Where to read on
#
# - [Published checkpoints and data](../docs/published.md): settings that you can give, how to keep the teacher for
#   further training, the published data folders.
# - [Flickr30K and MS-COCO](../docs/guides/flickr30k-coco.md): training and evaluation as in the paper.
# - [Evaluation](../docs/evaluation.md): what every number means, ties, intervals, ECCV Caption.
