"""Make the run card: data, configuration, versions, hardware and metrics of a run."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from d2svse.data import ImageTextDataset
from d2svse.training.distributed import world_size
from d2svse.version import __version__

RUN_CARD_FILE = "run.json"
PROTOCOL = "custom"  # training evaluates on all images and captions of the set
STARTS = ("vision", "text", "model")  # fields of a recipe that name a model to start from
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "numpy", "pillow")


def run_card(
    configuration: dict[str, Any],
    datasets: dict[str, ImageTextDataset],
    metrics: dict[str, dict[str, float]],
    command: list[str],
) -> dict[str, Any]:
    """Return everything that a reader needs to judge or repeat a run, as values for JSON.

    Args:
        configuration: the effective recipe.
        datasets: data sets by their role, such as "train" and "val".
        metrics: metrics by stage, of the test set if `datasets` has one, or else of the validation set.
        command: words of the command line.
    """
    return {
        "d2svse": __version__,
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "command": command,
        "seed": configuration.get("seed"),
        "configuration": configuration,
        "hub_models": [name for name in map(configuration.get, STARTS) if name and not Path(name).exists()],
        "data": {
            name: {
                "source": dataset.source,
                "images": len(dataset),
                "captions": len(dataset.captions),
                "sha256": dataset.sha256,
            }
            for name, dataset in datasets.items()
        },
        "hardware": hardware(),
        "protocol": PROTOCOL,
        "metrics": metrics,
    }


def git_revision() -> str | None:
    """Return the git revision of the package, with "+changes" if files differ; None outside of a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(folder), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "--", __file__):
            return None  # the package is installed inside another checkout
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Return the processors and accelerators of this process, and the number of processes."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": world_size(),
    }
