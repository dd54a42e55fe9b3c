"""Speed and memory of evaluation, against the loops that published implementations use.

    python benchmarks/evaluation.py ranks
    python benchmarks/evaluation.py dataset --model MODEL --data dev.jsonl
    python benchmarks/evaluation.py truth

`ranks`: the ranks of 5000 x 25 000 scores, 5 captions an image. The reference is the loop of the published
evaluation's kind: for each image `np.argsort` of its scores, reversed, and `np.where` for each of its captions; then
the same for each caption on the transposed matrix. Then the memory of the ranks streamed from embeddings 512 wide.

`dataset`: a whole evaluation, from files to R@K. The reference goes through the captions in the order they come, 128 at
a time: each batch decodes (at full size) and encodes the picture of every caption anew (one with 5 captions 5 times)
and pads its sentences to the longest among them; of the image vectors one for each picture is kept, and the argsort
loop ranks. Both use the same model and the same number of threads; where oneDNN's linear layers are faster than
PyTorch's own, the time here is also taken without them.

`truth`: CxC's R@1, 5, 10 and ECCV Caption's R@1, mAP@R and R-Precision, from a matrix of made-up scores (float64, so
that none tie) and the files of right answers to the numbers. The reference sorts every row and every column, and gives
these full rankings to the `eccv_caption` package, as arrays of ids, which take less memory than the lists that its
documentation asks for.

Memory is the rise of the peak resident set above what is held before, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from d2svse import D2SVSE, ImageTextDataset, evaluate
from d2svse.cpu import prepare_cpu
from d2svse.data.manifest import Record
from d2svse.models import onednn
from d2svse.retrieval.evaluation.metrics import (
    MATRIX_TILE,
    RightAnswers,
    best_ranks_in_tiles,
    caption_answers,
    rank_metrics,
    ranks,
    whole_matrix,
)
from d2svse.retrieval.evaluation.protocols import find_protocol, right_answers, take_split
from d2svse.retrieval.evaluation.ranking import ranking_metrics, rankings
from d2svse.retrieval.evaluation.scorer import Scorer, stream_ranks

IMAGES, CAPTIONS_EACH, DIM = 5000, 5, 512
CAPTIONS = IMAGES * CAPTIONS_EACH
BATCH = 128


def argsort_ranks(scores: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranks of both directions by sorting every row and every column, as the published evaluation does."""
    captions_of = [np.flatnonzero(owner == image) for image in range(len(scores))]
    i2t = np.empty(len(scores), dtype=np.int64)
    for image in range(len(scores)):
        order = np.argsort(scores[image])[::-1]
        i2t[image] = min(np.where(order == caption)[0][0] for caption in captions_of[image])
    t2i = np.empty(len(owner), dtype=np.int64)
    transposed = scores.T
    for caption in range(len(owner)):
        order = np.argsort(transposed[caption])[::-1]
        t2i[caption] = np.where(order == owner[caption])[0][0]
    return i2t, t2i


def embeddings(count: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Made-up embeddings of so many images and of their captions, and the image of each caption."""
    torch.manual_seed(0)
    owner = np.arange(count * CAPTIONS_EACH) // CAPTIONS_EACH
    images = torch.randn(count, DIM)
    texts = images[owner] + 4 * torch.randn(len(owner), DIM)
    return torch.nn.functional.normalize(images, dim=-1), torch.nn.functional.normalize(texts, dim=-1), owner


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it gave."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def status(field: str) -> float:
    """A field of this process's memory in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


class Growth:
    """How much the peak of the resident set rises above what is held at the start, in MB."""

    def __enter__(self) -> Growth:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before = status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.megabytes = status("VmHWM") - self.before


def child(*arguments: str) -> dict[str, Any]:
    """Run a part of this script in a process of its own; it prints one JSON object."""
    call = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_ranks(repeats: int, count: int) -> None:
    """Time the ranks of given scores, in turns with the reference, and of embeddings."""
    images, texts, owner = embeddings(count)
    scores = (images @ texts.T).numpy()
    answers = caption_answers(owner, count)
    times: dict[str, list[float]] = {"argsort loops": [], "here": [], "here, from embeddings": []}
    for _ in range(repeats):
        for name, call in (
            ("argsort loops", lambda: argsort_ranks(scores, owner)),
            ("here", lambda: ranks(scores, owner)),
            ("here, from embeddings", lambda: stream_ranks(Scorer.of_product(images, texts), *answers)),
        ):
            taken, found = seconds(call)
            times[name].append(taken)
            if name == "argsort loops":
                expected = found
            # a tie may fall either way in a sort; here it counts against the model
            different = sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in zip(found, expected, strict=True))
            if different > (len(images) + len(texts)) // 1000:
                raise RuntimeError(f"{name}: {different} ranks differ")
    slow = statistics.median(times["argsort loops"])
    memory = child("ranks-memory", "--images", str(count))
    print(f"| ranks of {len(images)} × {len(texts)} scores | seconds | times faster | extra MB |")
    print("| --- | ---: | ---: | ---: |")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"| {name} | {middle:.2f} | {slow / middle:.1f} | {memory[name]:.0f} |")


def measure_ranks_memory(count: int) -> None:
    """The memory of each way, above the scores or the embeddings that it is given."""
    images, texts, owner = embeddings(count)
    answers = caption_answers(owner, count)
    few = min(100, count)  # so that the libraries' own buffers are there before
    stream_ranks(Scorer.of_product(images[:few], texts[:few]), *caption_answers(np.arange(few), few))
    result = {}
    with Growth() as growth:
        stream_ranks(Scorer.of_product(images, texts), *answers)
    result["here, from embeddings"] = growth.megabytes
    scores = (images @ texts.T).numpy()
    for name, call in (("here", ranks), ("argsort loops", argsort_ranks)):
        with Growth() as growth:
            call(scores, owner)
        result[name] = growth.megabytes
    print(json.dumps(result))


def read_picture(path: Path) -> Image.Image:
    """Decode a picture at its full size, as the published data loader does."""
    with Image.open(path) as image:
        return image.convert("RGB")


def encode_per_caption(model: D2SVSE, dataset: ImageTextDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and caption vectors as the published evaluation makes them, and the image of each caption."""
    owner = dataset.image_of_caption
    images, texts = [], []
    with ThreadPoolExecutor(os.cpu_count()) as readers:
        for first in range(0, len(owner), BATCH):
            batch = slice(first, first + BATCH)
            pictures = list(readers.map(read_picture, [Path(dataset.images[row]) for row in owner[batch]]))
            pixels = model.processor.pixel_values(pictures)
            tokens = model.processor.pad(model.processor.tokenize(dataset.captions[batch]))
            with torch.inference_mode():
                images.append(F.normalize(model.get_image_features(pixels).pooler_output).numpy())
                texts.append(F.normalize(model.get_text_features(**tokens).pooler_output).numpy())
    first_caption = np.searchsorted(owner, np.arange(len(dataset)))
    return np.concatenate(images)[first_caption], np.concatenate(texts), owner


def measure_dataset(model_name: str, data: str) -> None:
    """Time a whole evaluation, in turns: here, the reference, here; with the threads of the `d2svse eval` command."""
    prepare_cpu()
    model, dataset = D2SVSE.from_pretrained(model_name), ImageTextDataset.from_manifest(data)
    few = ImageTextDataset(dataset.records[:BATCH])
    evaluate(model, few, batch_size=BATCH)

    def reference() -> dict[str, float]:
        images, texts, owner = encode_per_caption(model, dataset)
        return rank_metrics(*argsort_ranks(images @ texts.T, owner))

    def here() -> dict[str, float]:
        return evaluate(model, dataset, batch_size=BATCH).rank_metrics

    def plain() -> dict[str, float]:
        with mock.patch.object(onednn, "has_slow_blas", return_value=False):
            return here()

    first, found = seconds(here)
    slow, expected = seconds(reference)
    without, _ = seconds(plain)
    second, _ = seconds(here)
    fast = (first + second) / 2
    difference = max(abs(found[name] - expected[name]) for name in found if "recall" in name)
    print(f"| {len(dataset)} pictures, {len(dataset.captions)} captions | seconds | times faster | rSum |")
    print("| --- | ---: | ---: | ---: |")
    print(f"| a picture a caption, in the order they come | {slow:.1f} | 1.0 | {100 * expected['rsum']:.1f} |")
    print(f"| here, linear layers as PyTorch has them | {without:.1f} | {slow / without:.1f} | |")
    print(f"| here | {fast:.1f} | {slow / fast:.1f} | {100 * found['rsum']:.1f} |")
    chosen = "oneDNN" if onednn.has_slow_blas() else "PyTorch"
    print(f"\n{torch.get_num_threads()} threads, linear layers by {chosen}; here {first:.1f} and {second:.1f} s;")
    print(f"recalls differ by {difference:.4f}")


def truth_scores() -> np.ndarray:
    """Made-up scores of MS-COCO's test images and captions, in the order of the split."""
    random = np.random.default_rng(0)
    images = random.normal(size=(IMAGES, 64))
    return images @ (np.repeat(images, CAPTIONS_EACH, 0) + 2 * random.normal(size=(CAPTIONS, 64))).T


def coco_ids() -> tuple[list[int], list[int]]:
    """Ids of the 5000 images and the 25 000 captions, from the package."""
    import eccv_caption

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = eccv_caption.Metrics()
    captions = truth.coco_ids.tolist()
    return [truth.coco_gts["t2i"][caption][0] for caption in captions[::CAPTIONS_EACH]], captions


def asked_of_package(every: int) -> Any:
    """The package's truths, of which every so many-th query of each is kept."""
    import eccv_caption

    truth = eccv_caption.Metrics()
    for lists in (truth.cxc_gts, truth.eccv_gts):
        for direction, answers in lists.items():
            lists[direction] = dict(list(answers.items())[::every])
    return truth


def truth_by_package(every: int) -> dict[str, float]:
    """Full rankings, and the package's metrics of them."""
    scores = truth_scores()
    images, captions = (np.array(ids) for ids in coco_ids())

    def measure() -> dict[str, float]:
        truth = asked_of_package(every)
        i2t, t2i = (set(truth.cxc_gts[name]) | set(truth.eccv_gts[name]) for name in ("i2t", "t2i"))
        i2t = {int(image): captions[np.argsort(scores[i])[::-1]] for i, image in enumerate(images) if image in i2t}
        t2i = {int(text): images[np.argsort(scores[:, i])[::-1]] for i, text in enumerate(captions) if text in t2i}
        wanted = ("cxc_recalls", "eccv_map_at_r", "eccv_rprecision", "eccv_r1")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            found = truth.compute_all_metrics(i2t, t2i, target_metrics=wanted, Ks=(1, 5, 10))
        return {f"{name} {direction}": float(v) for name, both in found.items() for direction, v in both.items()}

    return measured(measure)


def only(answers: RightAnswers, queries: list[int], asked: Collection[int]) -> RightAnswers:
    """The right answers of the queries that are asked."""
    kept, counts = np.isin(queries, list(asked)), np.diff(answers.offsets)
    return RightAnswers(np.concatenate([[0], (counts * kept).cumsum()]), answers.answers[np.repeat(kept, counts)])


def truth_here(every: int) -> dict[str, float]:
    """The same metrics from tiles of the scores."""
    scores = truth_scores()
    images, captions = coco_ids()
    each = CAPTIONS_EACH
    records = [
        Record(Path(f"COCO_val2014_{image:012d}.jpg"), tuple(map(str, captions[each * i : each * (i + 1)])))
        for i, image in enumerate(images)
    ]
    rows = [
        {"image_id": images[i // each], "id": caption, "caption": str(caption)} for i, caption in enumerate(captions)
    ]

    def measure() -> dict[str, float]:
        found = {}
        for protocol, short in (("cxc", "cxc"), ("eccv-caption", "eccv")):
            rules = find_protocol(protocol)
            dataset, _ = take_split(rules, ImageTextDataset(records))
            answers = right_answers(rules, dataset, file.name)
            if every > 1:
                lists = getattr(asked_of_package(every), f"{short}_gts")
                answers = only(answers[0], images, lists["i2t"]), only(answers[1], captions, lists["t2i"])
            if short == "cxc":  # the best right answer of each query is all that R@K needs
                scored = rank_metrics(*best_ranks_in_tiles(whole_matrix(scores, *answers), *answers, MATRIX_TILE))
                names = {f"recall_at_{k}": f"r{k}" for k in (1, 5, 10)}
            else:
                scored = ranking_metrics(*rankings(scores, *answers))
                names = {"recall_at_1": "r1", "map_at_r": "map_at_r", "r_precision": "rprecision"}
            for direction in ("i2t", "t2i"):
                found |= {
                    f"{short}_{theirs} {direction}": scored[f"{direction}_{ours}"] for ours, theirs in names.items()
                }
        return found

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"annotations": rows}, file)
        file.flush()
        return measured(measure)


def measured(call: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What a call gives, with its seconds and its memory."""
    with Growth() as growth:
        taken, found = seconds(call)
    return found | {"seconds": taken, "megabytes": growth.megabytes}


def measure_truth(every: int) -> int:
    """CxC and ECCV Caption, a process each, in turns; 1 if the numbers differ."""
    here, package, again = (child(f"truth-{how}", "--every", str(every)) for how in ("here", "package", "here"))
    fast = (here["seconds"] + again["seconds"]) / 2
    numbers = [name for name in here if name not in ("seconds", "megabytes")]
    difference = max(abs(here[name] - package[name]) for name in numbers)
    print("| CxC and ECCV Caption from scores | seconds | extra MB |")
    print("| --- | ---: | ---: |")
    print(f"| full rankings and `eccv_caption` | {package['seconds']:.2f} | {package['megabytes']:.0f} |")
    print(f"| here | {fast:.2f} | {here['megabytes']:.0f} |")
    print(f"| here / there | {fast / package['seconds']:.2f} | {here['megabytes'] / package['megabytes']:.2f} |")
    print(f"\n{len(numbers)} numbers, which differ by {difference:.1e} at most")
    return int(difference > 1e-6)


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ranks", "dataset", "truth", "ranks-memory", "truth-here", "truth-package"))
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=IMAGES, help="of `ranks`, 5 captions each")
    parser.add_argument("--every", type=int, default=1, help="of `truth`, ask every so many-th query")
    given = parser.parse_args()
    if given.what == "ranks":
        measure_ranks(given.repeats, given.images)
    elif given.what == "ranks-memory":
        measure_ranks_memory(given.images)
    elif given.what == "dataset":
        if not (given.model and given.data):
            parser.error("dataset needs --model and --data")
        measure_dataset(given.model, given.data)
    elif given.what == "truth":
        return measure_truth(given.every)
    else:
        warnings.simplefilter("ignore")
        print(json.dumps((truth_here if given.what == "truth-here" else truth_by_package)(given.every)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
