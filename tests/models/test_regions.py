"""Region features: the path of `.npy` files through training, evaluation and search."""

import os
import shutil

import numpy as np
import pytest
import torch
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

from d2svse import D2SVSE, ImageTextDataset, ImageTextIndex, Trainer, evaluate
from d2svse.images import ImageError, image_state
from d2svse.images.regions import RegionImage, region_images
from d2svse.integrations.onnx import export_programs
from d2svse.retrieval.embeddings.regions import write_regions


@pytest.fixture
def files(tmp_path):
    """Region files of 12 training and 6 validation images: features of up to 5 regions of 8 numbers, two captions."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("dev", 6)):
        features = rng.normal(size=(count, 5, 8)).astype(np.float32)
        features[::2, 3:] = 0  # three regions
        np.save(tmp_path / f"{split}_ims.npy", features)
        captions = [f"a {color} circle {row}" for row in range(count) for color in ("red", "blue")]
        (tmp_path / f"{split}_caps.txt").write_text("".join(f"{caption}\n" for caption in captions))
        rows = "".join(f'{{"text": "a long text about {row} and a star"}}\n' for row in range(count))
        (tmp_path / f"tiny_{split}.jsonl").write_text(rows)
    return tmp_path


@pytest.fixture
def make(files, backbones):
    def make(**options) -> D2SVSE:
        torch.manual_seed(0)
        options = {"image_projection": "residual_mlp", "embed_dim": 24, **options}
        return D2SVSE.from_backbones(files / "train_ims.npy", backbones / "text", **options)

    return make


def test_the_captions_beside_a_file_belong_to_its_rows(files):
    dataset = ImageTextDataset.from_source(files / "train_ims.npy", on_bad_image="error")
    assert dataset.image_of_caption.tolist() == [row for row in range(12) for _ in range(2)]
    assert dataset.images[3].name == "train_ims.npy#3"
    assert dataset.dense_captions[3] == "a long text about 3 and a star"
    ids = [row for row in range(12) for _ in range(3 if row == 0 else 1 if row == 1 else 2)]
    (files / "train_ids.txt").write_text("".join(f"{100 - row}\n" for row in ids))
    dataset = ImageTextDataset.from_source(files / "train_ims.npy")
    assert dataset.image_of_caption.tolist() == ids
    for lines in (ids[:-1], ids[:11], [0] * 24):
        (files / "train_ids.txt").write_text("".join(f"{row}\n" for row in lines))
        found = f"24 captions in train_caps.txt, and {len(lines)} ids of {len(set(lines))} images in train_ids.txt"
        with pytest.raises(ValueError, match=found):
            ImageTextDataset.from_source(files / "train_ims.npy")
    (files / "train_ids.txt").write_text("".join(f"{row}\n" for row in range(12)))
    dataset = ImageTextDataset.from_source(files / "train_ims.npy")
    assert dataset.image_of_caption.tolist() == [row for row in range(12) for _ in range(2)]
    (files / "train_ids.txt").unlink()
    (files / "train_caps.txt").write_text("one\n" * 13)
    with pytest.raises(ValueError, match=r"train_ims.npy: 12 images and 13 captions in train_caps.txt"):
        ImageTextDataset.from_source(files / "train_ims.npy")


@pytest.mark.parametrize("similarity", ["cosine", "max-mean", "scan-t2i", "omit"])
def test_both_stages_train_and_the_model_is_evaluated_searched_and_loaded(similarity, files, make, make_args, tmp_path):
    model = make(similarity=similarity)
    train, dev = (ImageTextDataset.from_source(files / f"{split}_ims.npy") for split in ("train", "dev"))
    for stage in ("pretrain", "distill"):
        args = make_args(stage, max_steps=2, save_strategy="no", per_device_train_batch_size=6)
        before = model.image_encoder.mlp.inner.weight.detach().clone()
        Trainer(model, args, train, dev).train()
        assert not torch.equal(model.image_encoder.mlp.inner.weight, before)
    model.save_pretrained(tmp_path / "model")
    loaded = D2SVSE.from_pretrained(tmp_path / "model")
    assert evaluate(loaded, dev).metrics == evaluate(model, dev).metrics
    index = ImageTextIndex.build(loaded, files / "dev_ims.npy", tmp_path / "index")
    assert len(index) == 6
    text = dev.captions[0]
    scores = loaded.similarity(
        loaded.encode_image(dev.images, output="features"), loaded.encode_text([text], output="features")
    )
    best = index.search(text, k=1)[0][0]
    assert best.id == f"{(files / 'dev_ims.npy').resolve()}#{int(scores[:, 0].argmax())}"


def test_rows_names_and_arrays_give_one_embedding_and_padding_gives_none(files, make):
    model = make()
    rows = region_images(files / "dev_ims.npy")
    array = np.load(files / "dev_ims.npy")
    expected = model.encode_image(rows)
    assert np.allclose(model.encode_image([f"{files}/dev_ims.npy#{row}" for row in range(6)]), expected, atol=1e-6)
    assert np.allclose(model.encode_image(list(array)), expected, atol=1e-6)
    assert np.allclose(model.encode_image([torch.from_numpy(array[2])]), expected[2], atol=1e-6)
    assert np.allclose(model.encode_image([array[0, :3]]), expected[0], atol=1e-6)  # without its padding
    features = model.encode_image(rows, output="features")
    assert features.mask.sum(1).tolist() == [3, 5, 3, 5, 3, 5]
    pooled = model.image_encoder.pooling(features.tokens[:1, :3])
    assert torch.allclose(torch.nn.functional.normalize(pooled), features.pooled[:1], atol=1e-5)


def test_tokens_are_the_projection_and_the_mlp_number_by_number(files, make):
    model, regions = make().eval(), np.load(files / "dev_ims.npy")[1]
    encoder = model.image_encoder
    part = {name: value.detach().double().numpy() for name, value in encoder.state_dict().items()}
    found = model.encode_image([regions], output="features").tokens[0].double().numpy()
    for region, token in zip(regions, found, strict=True):
        inner = part["mlp.inner.weight"] @ region + part["mlp.inner.bias"]
        spread = np.sqrt(part["mlp.norm.running_var"] + encoder.mlp.norm.eps)
        inner = (inner - part["mlp.norm.running_mean"]) / spread * part["mlp.norm.weight"] + part["mlp.norm.bias"]
        outer = part["mlp.outer.weight"] @ np.maximum(inner, 0) + part["mlp.outer.bias"]
        assert np.allclose(token, part["projection.weight"] @ region + part["projection.bias"] + outer, atol=1e-5)


def test_dropping_regions_in_training_keeps_a_real_one(files, make):
    model = make().eval()
    pixels = model.processor.pixel_values(region_images(files / "dev_ims.npy")[:1])
    none = torch.zeros(1, 5, dtype=torch.bool)
    assert model.image_encoder(pixels, none).mask.tolist() == [[True, True, True, False, False]]
    first = torch.tensor([[True, False, False, True, True]])
    assert model.image_encoder(pixels, first).mask.tolist() == [[True, False, False, False, False]]


def test_boxes_beside_a_file_are_appended(files, make):
    boxes = np.zeros((6, 5, 4), np.float32)
    boxes[:] = [0.25, 0.5, 0.75, 1]
    np.save(files / "dev_boxes.npy", boxes)
    features = RegionImage(str(files / "dev_ims.npy"), 0).features()
    assert features.shape == (5, 13)
    assert features[0, 8:].tolist() == [0.25, 0.5, 0.75, 1, 0.25]
    assert not features[3:].any()  # padding stays padding
    with pytest.raises(ImageError, match=r"region features of shape \(5, 13\); the model takes \(n_regions, 8\)"):
        make().encode_image(region_images(files / "dev_ims.npy"))
    boxes[0, 0, 2] = 640
    np.save(files / "dev_boxes.npy", boxes)
    with pytest.raises(ImageError, match="as shares from 0 to 1"):
        RegionImage(str(files / "dev_ims.npy"), 0).features()


def test_images_have_changed_if_their_boxes_have(files, make, tmp_path):
    def save(value):
        np.save(files / "dev_boxes.npy", np.full((6, 5, 4), value, np.float32))
        os.utime(files / "dev_boxes.npy", (int(100 * value),) * 2)

    source, image = files / "dev_ims.npy", RegionImage(str(files / "dev_ims.npy"), 3)
    states = [image.state]
    for value in (0.25, 0.5):
        save(value)
        states.append(image.state)
        assert image_state(f"{source}#3") == image.state
    assert len(set(states)) == 3
    shutil.copy(files / "dev_boxes.npy", files / "train_boxes.npy")
    np.save(files / "train_ims.npy", np.load(source))
    model = make()
    index = ImageTextIndex.build(model, source, tmp_path / "index")
    assert index.add(source).changed == []
    save(0.75)
    assert index.add(source).changed == list(index.ids)


def test_bad_features_are_named(files, make):
    features = np.load(files / "dev_ims.npy")
    features[1, 0, 0], features[2] = np.nan, 0
    np.save(files / "dev_ims.npy", features)
    rows = region_images(files / "dev_ims.npy")
    for row, error in ((1, "dev_ims.npy#1: region features with NaN"), (2, "dev_ims.npy#2: no region")):
        with pytest.raises(ImageError, match=error):
            rows[row].features()
    with pytest.raises(ImageError, match=r"dev_ims.npy#9: no such row; the file has 6"):
        RegionImage(str(files / "dev_ims.npy"), 9).features()
    dataset = ImageTextDataset.from_source(files / "dev_ims.npy", on_bad_image="skip")
    assert len(dataset) == 4
    np.save(files / "dev_ims.npy", np.zeros((6, 8)))
    with pytest.raises(ValueError, match=r"dev_ims.npy: expected floats of shape \(n_images, n_regions, width\)"):
        ImageTextDataset.from_source(files / "dev_ims.npy")
    model = make()
    for source in ("photo.jpg", np.zeros((6, 5, 8), np.float32)):
        with pytest.raises(ImageError, match="region features"):
            model.encode_image([source])


def test_a_model_of_images_refuses_rows_of_regions(files, model):
    with pytest.raises(ImageError, match=r"dev_ims.npy#0: .*only a model with --vision FILE.npy reads it"):
        model.encode_image(region_images(files / "dev_ims.npy")[:1])


def test_region_features_take_no_image_size(files, backbones):
    with pytest.raises(ValueError, match="region features have no pixels"):
        D2SVSE.from_backbones(files / "train_ims.npy", backbones / "text", image_size=64)


def test_tokens_in_a_file_train_as_the_images_of_a_frozen_backbone(
    backbones, train_dataset, val_dataset, make_args, tmp_path
):
    for split, dataset in (("train", train_dataset), ("val", val_dataset)):
        shape = write_regions(dataset.records, str(backbones / "vision"), tmp_path, split, batch_size=8, device="cpu")
        assert shape == (len(dataset), 17, 32)
        with pytest.raises(FileExistsError, match=f"{split}_ims.npy: already exists"):
            write_regions(dataset.records, str(backbones / "vision"), tmp_path, split)
    (tmp_path / "dense_dev.jsonl").touch()
    with pytest.raises(FileExistsError, match=r"dense_dev\.jsonl: already exists"):
        write_regions(val_dataset.records, str(backbones / "vision"), tmp_path, "dev")
    with pytest.raises(ValueError, match="an empty list"):
        write_regions([], str(backbones / "vision"), tmp_path, "none")
    sources = {
        "images": (backbones / "vision", train_dataset, val_dataset),
        "regions": (
            tmp_path / "train_ims.npy",
            *(ImageTextDataset.from_source(tmp_path / f"{split}_ims.npy") for split in ("train", "val")),
        ),
    }
    models = {
        name: D2SVSE.from_backbones(vision, backbones / "text", embed_dim=24)
        for name, (vision, _, _) in sources.items()
    }
    start = models["images"].state_dict()
    models["regions"].load_state_dict({name: start[name] for name in models["regions"].state_dict()})
    tables, losses = {}, {}
    for name, (_, train, val) in sources.items():
        options = {"freeze_vision": True, "augment_images": False, "output_dir": str(tmp_path / name)}
        trainer = Trainer(models[name], make_args(max_steps=6, save_strategy="no", **options), train, val)
        trainer.train()
        losses[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        tables[name] = evaluate(models[name], val).metrics
    assert len(losses["images"]) == 6
    assert losses["regions"] == pytest.approx(losses["images"], rel=1e-3)
    assert tables["regions"] == tables["images"]


def test_a_detector_gives_its_most_certain_objects_with_their_boxes(val_dataset, tmp_path):
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, backbone=None, use_pretrained_backbone=False, d_model=16,
        num_queries=7, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    detector = DetrForObjectDetection(config).eval()
    detector.save_pretrained(tmp_path / "detr")
    DetrImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "detr")
    shape = write_regions(
        val_dataset.records[:3], str(tmp_path / "detr"), tmp_path / "out", "dev", num_regions=4, device="cpu"
    )
    assert shape == (3, 4, 16)
    row = region_images(tmp_path / "out" / "dev_ims.npy")[0].features()
    assert row.shape == (4, 21)
    assert (row[:, 16:] >= 0).all()
    assert (row[:, 16:] <= 1).all()


def test_the_exported_image_encoder_masks_padding(files, make):
    model = make().eval()
    program = export_programs(model)["image_encoder"].module()
    pixels = model.processor.pixel_values(region_images(files / "dev_ims.npy"))
    with torch.no_grad():
        for count in (1, 3):
            expected = model.image_vectors(pixels[:count])
            torch.testing.assert_close(program(pixels[:count])[0], expected, atol=1e-5, rtol=0)


def test_the_command_writes_the_files_of_a_split(run, val_dataset, scenes, backbones, tmp_path):
    options = ("--vision", backbones / "vision", "--name", "val", "--device", "cpu")
    code, out, err = run("data", "regions", scenes / "val.jsonl", tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert "val_ims.npy: 16 images, 17 regions, width 32" in out
    dataset = ImageTextDataset.from_source(tmp_path / "out" / "val_ims.npy")
    assert dataset.captions == val_dataset.captions
    assert dataset.dense_captions == val_dataset.dense_captions
    assert dataset.image_of_caption.tolist() == val_dataset.image_of_caption.tolist()
    code, _, err = run("data", "regions", scenes / "val.jsonl", tmp_path / "out", *options)
    assert (code, err.count("\n")) == (2, 1)
    assert "val_ims.npy: already exists" in err
