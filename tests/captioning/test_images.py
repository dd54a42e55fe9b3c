import json
import shutil

import pytest

from d2svse import ImageTextDataset
from d2svse.captioning.images import Sampling, images_to_caption, take_part
from d2svse.data import ManifestError
from support.images import write_images


def write_dense(path, images):
    path.write_text("".join(json.dumps({"image": p.name, "dense": f"of {p.path.stem}"}) + "\n" for p in images))
    return path


def test_names_are_those_that_training_looks_for(tmp_path):
    photos = write_images(tmp_path / "data" / "photos", 4)
    manifest = tmp_path / "data" / "train.jsonl"
    outside = shutil.copy(photos / "003.png", tmp_path / "outside.png")
    rows = [{"image": f"photos/00{row}.png", "captions": ["x"]} for row in range(3)]
    rows.append({"image": str(outside), "captions": ["x"]})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = images_to_caption(manifest)
    assert [p.name for p in images] == ["photos/000.png", "photos/001.png", "photos/002.png", str(outside)]
    dense = write_dense(tmp_path / "elsewhere.jsonl", images)
    dataset = ImageTextDataset.from_manifest(manifest, dense=dense)
    assert dataset.dense_captions == ["of 000", "of 001", "of 002", "of outside"]
    (tmp_path / "link.png").symlink_to(photos / "003.png")
    both = "".join(
        json.dumps({"image": f"../{name}", "captions": ["x"]}) + "\n" for name in ("outside.png", "link.png")
    )
    (tmp_path / "data" / "both.jsonl").write_text(both)
    assert len({p.name for p in images_to_caption(tmp_path / "data" / "both.jsonl")}) == 2
    folder = images_to_caption(photos)
    assert [p.name for p in folder] == [f"00{row}.png" for row in range(4)]
    manifest.write_text("".join(json.dumps({"image": f"00{r}.png", "captions": ["x"]}) + "\n" for r in range(4)))
    assert [p.name for p in images_to_caption(manifest, image_folder=photos)] == [p.name for p in folder]
    dataset = ImageTextDataset.from_manifest(manifest, image_folder=photos, dense=write_dense(dense, folder))
    assert dataset.dense_captions == ["of 000", "of 001", "of 002", "of 003"]


def test_other_layouts_and_their_splits(tmp_path):
    photos = write_images(tmp_path / "images", 2)
    images = [
        {"filename": p.name, "split": s, "sentences": [{"raw": "x"}]}
        for p, s in zip(sorted(photos.iterdir()), ("train", "val"), strict=True)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    assert [p.name for p in images_to_caption(tmp_path / "dataset.json", split="val")] == ["images/001.png"]
    with pytest.raises(FileNotFoundError, match="no image in it"):
        images_to_caption(write_images(tmp_path / "empty", 0))
    (photos / "001.png").unlink()
    with pytest.raises(ManifestError, match="1 of 1 images are missing"):
        images_to_caption(tmp_path / "dataset.json", split="val")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_are_disjoint_and_complete(photos, count):
    images = images_to_caption(photos)
    parts = [take_part(images, f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(p.name for part in parts for p in part) == [p.name for p in images]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_part_is_refused(part):
    with pytest.raises(ValueError, match="i/n with i from 1 to n"):
        take_part([], part)


def test_seeds_depend_on_seed_content_and_draw():
    seeds = {
        Sampling(seed=seed).image_seed(content, draw) for seed in (0, 1) for content in (b"a", b"b") for draw in (0, 1)
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert Sampling().image_seed(b"a", 0) == 1296898112  # what a file says must stay true
