"""A token index that grows by single images keeps few files and few open descriptors."""

import multiprocessing
import os
import sys

import numpy as np
import pytest
from PIL import Image

from d2svse import ImageTextIndex

resource = pytest.importorskip("resource")


def add_many(model, folder, images, limit, queue):
    """In a process of its own, whose limit of open files is low."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    index = ImageTextIndex.build(model, images[:1], folder)
    for image in images[1:]:
        index.add([image])
    stores = len(list(folder.glob("store-*")))
    before = index.search("a red circle", k=len(images), rerank=len(images))[0]
    index.remove(images[::2])
    again = ImageTextIndex.load(folder, model)
    after = again.search("a red circle", k=len(images), rerank=len(images))[0]
    size = again.info()["bytes"]
    again.compact()
    compacted = ImageTextIndex.load(folder, model)
    queue.put(
        {
            "stores": stores,
            "open": len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0,
            "before": [(hit.id, hit.score) for hit in before],
            "after": [(hit.id, hit.score) for hit in after],
            "compacted": [
                (hit.id, hit.score) for hit in compacted.search("a red circle", k=len(images), rerank=len(images))[0]
            ],
            "smaller": size - compacted.info()["bytes"],
            "folders": len(list(folder.glob("store-*"))),
        }
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is forked, which this system cannot")
@pytest.mark.parametrize(("count", "limit"), [(80, 96), pytest.param(400, 256, marks=pytest.mark.slow)])
def test_a_token_index_takes_many_adds_with_few_open_files(make_model, tmp_path, count, limit):
    model = make_model(similarity={"name": "omit"})
    rng = np.random.default_rng(0)
    images = [str(tmp_path / f"{number:04}.png") for number in range(count)]
    for path in images:
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=add_many, args=(model, tmp_path / "i", images, limit, queue))
    child.start()
    found = queue.get(timeout=600)
    child.join(10)
    assert child.exitcode == 0
    assert found["stores"] < 20
    assert found["open"] < 100
    exact = np.asarray(
        model.similarity(
            model.encode_image(images, output="features"), model.encode_text("a red circle", output="features")
        )
    )[:, 0]
    scores = dict(zip(images, exact.tolist(), strict=True))
    assert dict(found["before"]) == pytest.approx(scores, abs=2e-3)
    left = {name: score for name, score in scores.items() if name in images[1::2]}
    after = dict(found["after"])
    assert set(after) == set(left)
    assert after == pytest.approx(left, abs=2e-3)
    assert dict(found["compacted"]) == pytest.approx(after, abs=1e-6)
    assert found["folders"] == 1
    assert found["smaller"] > 0
