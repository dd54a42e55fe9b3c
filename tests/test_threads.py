"""One model, one index and one tokenizer in several threads."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from d2svse import D2SVSE
from d2svse.models.encoding import inference as _inference
from d2svse.retrieval import ImageTextIndex

THREADS, CALLS = 8, 500


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR, "d2svse"):
        yield


def at_once(work: Callable[[int], object], threads: int = THREADS) -> list:
    """What each thread gives, all of them started together."""
    start = threading.Barrier(threads)

    def run(number: int) -> object:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def without_layers(model: D2SVSE) -> None:
    """Leave of both backbones the embeddings alone, which is quick."""
    for backbone in (model.image_encoder.backbone, model.text_encoder.backbone):
        layers = next(module for module in backbone.modules() if isinstance(module, torch.nn.ModuleList))
        del layers[:]


@pytest.mark.parametrize(
    ("similarity", "calls"), [pytest.param("cosine", CALLS, marks=pytest.mark.slow), ("max-mean", 25)]
)
def test_searching_and_encoding_in_threads_equals_one_thread(make_model, val_dataset, tmp_path, similarity, calls):
    model = make_model(similarity={"name": similarity})
    without_layers(model)
    index = ImageTextIndex.build(model, val_dataset.images, tmp_path / "index")
    texts = val_dataset.captions[:12]
    limits = (4, 6, 9, None)

    def ask(text: str, limit: int | None) -> object:
        return index.search(text, k=3)[0] if limit is None else model.encode_text(text, max_length=limit)

    right = {(text, limit): ask(text, limit) for text in texts for limit in limits}
    queries = list(right)

    def work(number: int) -> None:
        choose = random.Random(number)
        for _ in range(calls):
            query = choose.choice(queries)
            found = ask(*query)
            if query[1] is None:
                assert [hit.id for hit in found] == [hit.id for hit in right[query]]
                scores = ([hit.score for hit in hits] for hits in (found, right[query]))
                np.testing.assert_allclose(*scores, atol=1e-5)
            else:
                np.testing.assert_allclose(found, right[query], atol=1e-5)

    at_once(work)


def test_a_tokenizer_keeps_each_threads_limit(processor):
    """By the processor's methods and by the tokenizer itself."""
    text = "a red circle above a blue ring next to a green square"
    ways = [
        lambda limit: processor.tokenize([text], limit)[0],
        lambda limit: processor(text=text, max_length=limit)["input_ids"][0].tolist(),
        lambda limit: processor.tokenizer(text, truncation=True, max_length=limit)["input_ids"],
        lambda limit: processor.tokenizer(text, padding="max_length", max_length=40)["input_ids"],
    ]
    right = [{limit: way(limit) for limit in range(3, 13)} for way in ways]

    def work(number: int) -> None:
        way, expected = ways[number % len(ways)], right[number % len(ways)]
        for turn in range(150):
            limit = 3 + (turn + number) % 10
            assert way(limit) == expected[limit]

    at_once(work)


def test_the_training_mode_comes_back_when_the_last_thread_is_done(make_model):
    model = make_model().train()
    inside, alone = threading.Event(), threading.Event()
    modes = []

    def second() -> None:
        with _inference(model):
            inside.set()
            alone.wait(10)
            modes.append(model.training)

    thread = threading.Thread(target=second)
    with _inference(model):
        thread.start()
        inside.wait(10)
    alone.set()  # the first is done, and the second still encodes
    thread.join()
    assert modes == [False]
    assert model.training


def test_encoding_in_threads_leaves_the_mode_that_was(make_model, val_dataset):
    model = make_model(context_decoder={"num_tokens": 4, "num_layers": 1, "num_heads": 2})
    right = {text: model.encode_text(text) for text in val_dataset.captions[:6]}
    model.train()

    def work(number: int) -> None:
        for text, expected in right.items():
            np.testing.assert_allclose(model.encode_text(text), expected, atol=1e-5)

    at_once(work)
    assert model.training
    assert model.text_encoder.training


def test_pictures_are_encoded_in_threads(model, val_dataset):
    images = val_dataset.images[:4]
    right = model.encode_image(images)
    for found in at_once(lambda _: [model.encode_image(images) for _ in range(3)], 4):
        for one in found:
            np.testing.assert_allclose(one, right, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_encoder_gives_no_wrong_answers(make_model):
    """It may refuse to run in several threads."""
    model = make_model()
    without_layers(model)
    right = {text: model.encode_text(text) for text in ("a red circle", "a blue ring")}
    model.text_encoder = torch.compile(model.text_encoder, backend="eager")
    model.encode_text("a red circle")  # compile it

    def work(number: int) -> None:
        for text, expected in right.items():
            try:
                found = model.encode_text(text)
            except Exception:
                continue
            np.testing.assert_allclose(found, expected, atol=1e-5)

    try:
        at_once(work, 2)
    finally:
        torch.compiler.reset()
