"""Speed, memory and recall of the vector engines.

    python benchmarks/search.py million --folder /large/disk
    python benchmarks/search.py photos --model MODEL --photos train.jsonl dev.jsonl --folder cache
    python benchmarks/search.py flat
    python benchmarks/search.py milvus

`million` searches 1 000 000 random normalised vectors, 512 wide, float16, on disk, by `ExactIndex` and by the bare
blocked product, in turns, and takes the memory in a process of its own. `photos` encodes real photos, enlarges them
by noise and normalises, and searches them with real captions by every engine. `flat` compares faiss's flat index with
its own BLAS threshold and with the one set here. `milvus` takes random vectors to Milvus embedded and over its gRPC
server on 127.0.0.1. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from d2svse.retrieval import ExactIndex, VectorIndex, load_index, make_index
from d2svse.retrieval.vectors.storage import map_array, read_manifest

DIM, ROWS, QUERIES, K = 512, 1_000_000, 100, 10
BARE_BLOCKS = (1024, 4096, 16384, 65536)
REPEATS = 7


def random_vectors(count: int, seed: int) -> np.ndarray:
    """Normalised, float32."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def seconds(call: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table, the first column left, the others right."""
    for line in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print("| " + " | ".join(line) + " |")


def million(given: argparse.Namespace) -> int:
    """The exact index against the bare product on one file."""
    folder = given.folder / f"exact-{given.rows}"
    if not (folder / "index.json").is_file():
        index = ExactIndex(DIM, "float16")
        for first in range(0, given.rows, 250_000):
            last = min(first + 250_000, given.rows)
            index.add([str(row) for row in range(first, last)], random_vectors(last - first, first + 1))
            index.save(folder)
        del index
    queries = random_vectors(QUERIES, 0)
    index = load_index(folder)
    parts = [(folder / part["file"], (part["rows"], DIM)) for part in read_manifest(folder)["vectors"]]
    maps = [map_array(path, shape, np.float16)[0] for path, shape in parts]

    def bare(block: int) -> None:
        for codes in maps:
            for first in range(0, len(codes), block):
                queries @ codes[first : first + block].astype(np.float32).T

    def brute_force(some: np.ndarray) -> list[list[str]]:
        scores = np.concatenate(
            [some @ c[i : i + 65536].astype(np.float32).T for c in maps for i in range(0, len(c), 65536)], axis=1
        )
        return [[str(row) for row in np.argsort(-line, kind="stable")[:K]] for line in scores]

    right = index.search(queries[:10], K)[1] == brute_force(queries[:10])
    calls: dict[str, Callable[[], object]] = {f"bare product, blocks of {n}": lambda n=n: bare(n) for n in BARE_BLOCKS}
    calls["`ExactIndex.search`, top 10"] = lambda: index.search(queries, K)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(given.repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(value for name, value in medians.items() if name.startswith("bare"))
    print(f"{len(index)} × {DIM} float16, {QUERIES} queries; the answers are right: {right}\n")
    rows = [[name, f"{1e3 * value:.0f}", f"{value / fastest:.2f}"] for name, value in medians.items()]
    table(["", "ms", "/ fastest bare product"], rows)
    memory = json.loads(subprocess.check_output([sys.executable, __file__, "memory", "--folder", str(folder)]))
    print("\nA process that loads the index and searches twice, MB:\n")
    table(["", "MB"], [[name, f"{value / 1e6:.0f}"] for name, value in memory.items()])
    return int(not right)


def memory(given: argparse.Namespace) -> int:
    """Peak memory of loading and searching; run in a process of its own (Linux)."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

    queries = random_vectors(QUERIES, 0)
    found = {"Python and the imports": status("VmRSS")}
    index = load_index(given.folder)
    found["and the ids"] = status("VmRSS")
    for _ in range(2):
        index.search(queries, K)
    found["peak of everything, pages of the mapped file included"] = status("VmHWM")
    found["of it not of the file, at the end"] = status("RssAnon")
    print(json.dumps(found))
    return 0


def photos(given: argparse.Namespace) -> int:
    """Every engine on embeddings of real photos, enlarged by noise, with real captions as queries."""
    from d2svse import D2SVSE, ImageTextDataset
    from d2svse.retrieval.vectors.tuning import EXACT_SETTINGS, FAISS_SETTINGS, Setting, tune

    given.folder.mkdir(parents=True, exist_ok=True)
    cache = given.folder / "photos.npz"
    if not cache.is_file():
        model = D2SVSE.from_pretrained(given.model)
        datasets = [ImageTextDataset.from_manifest(path) for path in given.photos]
        encoded = np.concatenate([model.encode_image(dataset.images, batch_size=64) for dataset in datasets])
        captions = model.encode_text(datasets[-1].captions[::10][: QUERIES * 5])
        np.savez(cache, images=encoded, captions=captions)
    stored = np.load(cache)
    images, queries = stored["images"], stored["captions"]
    rng = np.random.default_rng(0)
    copies = images[rng.integers(0, len(images), given.count - len(images))]
    noise = rng.standard_normal(copies.shape, dtype=np.float32) * (given.noise / np.sqrt(copies.shape[1]))
    vectors = np.concatenate([images, copies + noise])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    print(
        f"{len(images)} photos, enlarged to {len(vectors)} × {vectors.shape[1]} by copies with noise of norm "
        f"{given.noise} beside 1, normalised; {len(queries)} captions as queries, k = {K}\n"
    )
    finer = Setting("faiss", {"kind": "ivf-pq", "code_size": vectors.shape[1] // 2}, {"nprobe": (32, 128)})
    rows = []
    for row in tune(vectors, queries, k=K, settings=(*EXACT_SETTINGS, *FAISS_SETTINGS, finer)):
        figures = [row.recall, row.milliseconds, row.milliseconds_in_batch, row.bytes_per_vector, row.build_seconds]
        formats = ("{:.3f}", "{:.2f}", "{:.2f}", "{:.0f}", "{:.1f}")
        rows.append([row.setting, *(text.format(value) for text, value in zip(formats, figures, strict=True))])
    table(["setting", "recall@10", "ms, alone", "ms, in a batch", "bytes a vector", "built in s"], rows)
    return 0


def flat(given: argparse.Namespace) -> int:
    """Faiss's flat index, as it comes and with the threshold set for each search."""
    vectors, queries = random_vectors(given.count, 1), random_vectors(256, 0)
    index: Any = make_index("faiss", DIM)
    index.add([str(row) for row in range(len(vectors))], vectors)
    rows = []
    for count in (1, 2, 3, 4, 16, 100, 256):
        some = queries[:count]
        calls = (lambda some=some: index._index.search(some, K), lambda some=some: index.search(some, K))
        turns = [[seconds(call) for call in calls] for _ in range(REPEATS)]
        default, here = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
        rows.append([str(count), f"{default:.1f}", f"{here:.1f}", f"{default / here:.2f}"])
    print(f"{len(vectors)} × {DIM}, top {K}, ms\n")
    table(["queries", "faiss's threshold", "here", "times faster"], rows)
    return 0


def milvus(given: argparse.Namespace) -> int:
    """Milvus embedded and over its server: the same answers, and what they take."""
    vectors, queries = random_vectors(given.count, 1), random_vectors(QUERIES, 0)
    ids = [str(row) for row in range(len(vectors))]
    exact = ExactIndex(DIM)
    exact.add(ids, vectors)
    best = exact.search(queries, K)[1]
    rows, same = [], True
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", f"{name}/server", "--port", str(port)]
        server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL)
        try:
            wait_for(server, port)
            for kind in ("FLAT", "HNSW"):
                answers = []
                for place, uri in (("embedded", f"{name}/{kind}.db"), ("gRPC server", f"http://127.0.0.1:{port}")):
                    index = make_index("milvus", DIM, uri=uri, collection=f"c_{kind}", kind=kind, timeout=120)
                    added = seconds(lambda index=index: index.add(ids, vectors))
                    index.save(f"{name}/{kind}-{place}")
                    answers.append(index.search(queries, K))
                    rows.append([f"{kind}, {place}", *measured(index, queries, best), f"{added:.1f}"])
                equal = answers[0][1] == answers[1][1] and np.allclose(answers[0][0], answers[1][0], atol=1e-6)
                if kind == "FLAT":
                    same = equal
                    print(f"{kind}: the {QUERIES} answers of both are {'the same' if equal else 'DIFFERENT'}")
                else:  # threads build the graph, which differs from run to run
                    alike = np.mean(
                        [len(set(a) & set(b)) / K for a, b in zip(*(one[1] for one in answers), strict=True)]
                    )
                    print(f"{kind}: {alike:.1%} of the ids are the same")
        finally:
            server.kill()
            server.wait()
    print(f"\n{len(vectors)} × {DIM} random vectors, {QUERIES} queries, k = {K}\n")
    table(["", "recall@10", "ms, alone", "ms, in a batch", "added in s"], rows)
    return int(not same)


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a server of this machine listens, which takes seconds beside other work.

    Raises:
        RuntimeError: if it has ended, or does not listen after two minutes.
    """
    for _ in range(1200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError("the server of Milvus did not start")


def measured(index: VectorIndex, queries: np.ndarray, best: list[list[str]]) -> list[str]:
    """Recall and times of a search."""
    found = index.search(queries, K)[1]
    recall = statistics.mean(len(set(a) & set(b)) / K for a, b in zip(found, best, strict=True))
    alone = statistics.median(seconds(lambda query=query: index.search(query, K)) for query in queries[:30])
    batch = statistics.median(seconds(lambda: index.search(queries, K)) for _ in range(3)) / len(queries)
    return [f"{recall:.3f}", f"{1e3 * alone:.1f}", f"{1e3 * batch:.2f}"]


def main() -> int:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("million", help="the exact index against the bare product")
    part.add_argument("--folder", type=Path, default=Path("d2svse-search"), help="where the file is made, once")
    part.add_argument("--rows", type=int, default=ROWS)
    part.add_argument("--repeats", type=int, default=REPEATS)
    part.set_defaults(run=million)
    part = parts.add_parser("memory", help="what `million` starts")
    part.add_argument("--folder", type=Path, required=True)
    part.set_defaults(run=memory)
    part = parts.add_parser("photos", help="all engines on photos")
    part.add_argument("--model", required=True)
    part.add_argument("--photos", nargs="+", type=Path, required=True, help="manifests; captions come from the last")
    part.add_argument("--folder", type=Path, default=Path("d2svse-search"), help="where embeddings are kept")
    part.add_argument("--count", type=int, default=100_000)
    part.add_argument("--noise", type=float, default=0.5)
    part.set_defaults(run=photos)
    part = parts.add_parser("flat", help="faiss's flat index and its BLAS threshold")
    part.add_argument("--count", type=int, default=100_000)
    part.set_defaults(run=flat)
    part = parts.add_parser("milvus", help="Milvus embedded and over its server")
    part.add_argument("--count", type=int, default=20_000)
    part.set_defaults(run=milvus)
    given = parser.parse_args()
    return given.run(given)


if __name__ == "__main__":
    sys.exit(main())
