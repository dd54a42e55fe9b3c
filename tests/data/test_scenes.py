import numpy as np
from PIL import Image

from d2svse.data import make_scene, read_manifest, write_scenes
from d2svse.data.scenes import BACKGROUNDS, COLORS


def test_scenes_are_a_pure_function_of_seed_and_number():
    assert make_scene(1, 2) == make_scene(1, 2)
    assert make_scene(1, 2) != make_scene(1, 3)
    assert make_scene(1, 2) != make_scene(2, 2)
    np.testing.assert_array_equal(make_scene(1, 2).draw(), make_scene(1, 2).draw())
    assert make_scene(1, 2).sparse_captions == make_scene(1, 2).sparse_captions


def test_the_picture_shows_what_the_dense_caption_tells():
    for number in range(30):
        scene = make_scene(0, number)
        picture = np.asarray(scene.draw(96)).reshape(-1, 3)
        assert (picture == BACKGROUNDS[scene.background]).all(1).mean() > 0.4
        for item in scene.items:
            assert (picture == COLORS[item.color]).all(1).any()
            assert f"{item.size} {item.color} {item.shape} at the {item.place}" in scene.dense_caption
        assert len({(item.row, item.column) for item in scene.items}) == len(scene.items)


def test_five_sparse_captions_each_tell_a_part():
    for number in range(50):
        scene = make_scene(0, number)
        assert len(scene.sparse_captions) == 5
        for caption in scene.sparse_captions:
            assert len(caption) < len(scene.dense_caption)
            told = [item for item in scene.items if f"{item.color} {item.shape}" in caption]
            assert told
            assert " a orange" not in f" {caption}"


def test_a_larger_split_begins_with_the_smaller_one(tmp_path):
    small, large = (read_manifest(write_scenes(tmp_path, name, n, size=24)) for name, n in (("s", 3), ("l", 5)))
    assert [(r.captions, r.dense) for r in small] == [(r.captions, r.dense) for r in large[:3]]
    assert Image.open(small[0].image).size == (24, 24)
    write_scenes(tmp_path, "s", 2, size=24)  # written again in place
    assert len(read_manifest(tmp_path / "s.jsonl")) == 2
    assert not list(tmp_path.glob(".*"))
