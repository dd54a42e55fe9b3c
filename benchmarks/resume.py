"""Kill training at random moments, resume it, and compare the weights with those of a run that was left alone.

    python benchmarks/resume.py --kills 30 --truncations 20
    python benchmarks/resume.py --kills 4 --truncations 0 --processes 2

Both stages of a tiny model on drawn scenes, with worker processes, accumulated gradients, dropout, both caches and a
checkpoint every epoch. Kills alternate between SIGKILL and SIGTERM, of the whole process group; a run is resumed
until it ends. Truncations cut a random file of the newest checkpoint of a run that was killed, or now and then of the
one before. Exits with 1 if any weight differs in any bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d2svse.data import read_manifest, write_scenes
from d2svse.models.gru import build_tokenizer
from d2svse.training.checkpoints import SUMS_FILE

SIZE = 32


def prepare(folder: Path) -> None:
    """Scenes and tiny backbones."""
    write_scenes(folder / "scenes", "train", 96, size=SIZE)
    write_scenes(folder / "scenes", "val", 16, first=96, size=SIZE)
    records = read_manifest(folder / "scenes" / "train.jsonl")
    tokenizer = build_tokenizer([text for record in records for text in (*record.captions, record.dense or "")])
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    vision = ViTConfig(**small, hidden_dropout_prob=0.1, image_size=SIZE, patch_size=8)
    text = BertConfig(**small, vocab_size=len(tokenizer), max_position_embeddings=128)
    ViTModel(vision, add_pooling_layer=False).save_pretrained(folder / "vision")
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder / "vision")
    BertModel(text, add_pooling_layer=False).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")


def command(folder: Path, output: Path, processes: int, epochs: int) -> list[str]:
    """The training command of every run."""
    start = ["-m", "d2svse"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *start]
    options = ["per_device_train_batch_size=8", "gradient_accumulation_steps=2", "num_context_tokens=4"]
    options += ["decoder_layers=1", "decoder_heads=2", "disable_tqdm=true"]
    options += ["distill.freeze_vision=true", f"distill.cache_image_tokens={output / 'tokens'}"]
    scenes = folder / "scenes"
    return [
        *(sys.executable, *start, "train", "--train", str(scenes / "train.jsonl"), "--val", str(scenes / "val.jsonl")),
        *("--vision", str(folder / "vision"), "--text", str(folder / "text"), "-o", str(output)),
        *("--embed-dim", "24", "--epochs", str(epochs), "--workers", "1", "--resume"),
        *(part for option in options for part in ("--set", option)),
    ]


def launch(folder: Path, output: Path, *choice: int) -> subprocess.Popen[bytes]:
    """Start or resume a run; its output goes to a file beside it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with Path(f"{output}.log").open("ab") as log:
        return subprocess.Popen(
            command(folder, output, *choice), stdout=log, stderr=log, env=environment, start_new_session=True
        )


def finish(folder: Path, output: Path, *choice: int) -> None:
    """Resume a run to its end."""
    code = launch(folder, output, *choice).wait()
    if code:
        raise RuntimeError(f"exit {code}: see {output}.log")


def running(process: subprocess.Popen[bytes]) -> list[int]:
    """A process and all that it started, directly or not, data workers included (Linux)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [process.pid]
    for pid in found:
        found += children.get(pid, [])
    return found


def kill(process: subprocess.Popen[bytes], kind: signal.Signals, moment: float, alone: bool = True) -> bool:
    """Send a signal to a run after some seconds; whether it was still running."""
    try:
        process.wait(moment)
        return False
    except subprocess.TimeoutExpired:
        if kind == signal.SIGTERM:
            os.killpg(process.pid, kind)  # as a batch system and torchrun do it
        else:
            for pid in running(process):  # torchrun's processes have groups of their own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, kind)
        expected = {0, -kind, 128 + signal.SIGTERM} if alone else {0, -kind, 1}  # torchrun has a code of its own
        if process.wait(120) not in expected:
            raise RuntimeError(f"exit {process.returncode} after {kind.name}") from None
        return True


def same(one: Path, two: Path) -> bool:
    """Whether two runs ended with the same bits, in both stages and in their metrics."""
    for name in ("pretrain/model", "distill/model", "model"):
        a, b = (load_file(run / name / "model.safetensors") for run in (one, two))
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return (one / "results.json").read_bytes() == (two / "results.json").read_bytes()


def checkpoints_under_way(output: Path, stage: str) -> list[Path]:
    """The whole checkpoints of a stage that has not ended, the newest last."""
    results = output / "results.json"
    if results.is_file() and stage in json.loads(results.read_text()):
        return []
    found = (path for path in (output / stage / "checkpoints").glob("checkpoint-*") if (path / SUMS_FILE).is_file())
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def truncate(checkpoint: Path, random_: random.Random) -> str:
    """Cut a random file of a checkpoint short."""
    file = random_.choice(sorted(path for path in checkpoint.iterdir() if path.is_file() and path.stat().st_size))
    size = random_.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"{checkpoint.parts[-3]}/{checkpoint.name}/{file.name} cut to {size} bytes"


def main() -> int:
    """Run everything and say how often the weights were the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--truncations", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=4, help="of each stage, at least 3 to cut a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("d2svse-resume"))
    given = parser.parse_args()
    random_, folder = random.Random(given.seed), given.folder.absolute()
    choice = given.processes, given.epochs
    shutil.rmtree(folder, ignore_errors=True)
    prepare(folder)
    whole = folder / "whole"
    start = time.monotonic()
    finish(folder, whole, *choice)
    lasted = time.monotonic() - start
    print(f"left alone: {lasted:.0f} s", flush=True)
    right = 0
    for number in range(given.kills):
        kind, output = (signal.SIGKILL, signal.SIGTERM)[number % 2], folder / f"kill-{number}"
        moment, times = random_.uniform(0.2, 1.0) * lasted, 0
        times += kill(launch(folder, output, *choice), kind, moment, given.processes == 1)
        finish(folder, output, *choice)
        equal = same(whole, output)
        right += equal
        print(f"{kind.name} after {moment:.1f} s ({times} killed): {'same bits' if equal else 'DIFFERS'}", flush=True)
    recovered = 0
    for number in range(given.truncations):
        output = folder / f"cut-{number}"
        stage = random_.choice(("pretrain", "distill"))
        while len(found := checkpoints_under_way(output, stage)) < 2:  # so that there is one before the newest
            shutil.rmtree(output, ignore_errors=True)
            process = launch(folder, output, *choice)
            while process.poll() is None and len(checkpoints_under_way(output, stage)) < 2:
                time.sleep(0.05)
            kill(process, signal.SIGKILL, random_.uniform(0.01, 0.5))
        cut = truncate(random_.choice(found[-2:]) if number % 4 == 3 else found[-1], random_)
        finish(folder, output, *choice)
        if number % 4 != 3 and f"{found[-1]} is skipped" not in Path(f"{output}.log").read_text():
            raise RuntimeError(f"{cut}: nothing was said of it in {output}.log")
        equal = same(whole, output)
        recovered += equal
        print(f"{cut}: {'recovered, same bits' if equal else 'DIFFERS'}", flush=True)
    print(f"{right} of {given.kills} killed runs and {recovered} of {given.truncations} with a cut file ended alike")
    return int(right < given.kills or recovered < given.truncations)


if __name__ == "__main__":
    sys.exit(main())
