"""The README's figure: a run on real photos, epoch by epoch, beside what others reach with its backbones.

python benchmarks/real_photos_figure.py runs/flickr8k -o docs/images/real-photos.png

The run is that of docs/results.md; its curve is read from its logs. The lines beside it were measured on frozen
features of the same two backbones and the same photos.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from d2svse.visualize.figures import MEDIUM, new_figure, save_figure
from d2svse.visualize.training import read_logs

STAGES = {
    "pretrain": ("stage 1: dense text, frozen vision", "#7a9cc6"),
    "distill": ("stage 2: sparse captions and distillation", "#1f4e8c"),
}
FROZEN = {  # rSum on the 1000 validation photos, on frozen features
    "published code, aligning alone": 277,
    "published code, both stages": 291,
    "the same heads, InfoNCE": 308,
}


def draw(run: Path) -> Figure:
    """The figure.

    Args:
        run: folder of the run.
    """
    figure = new_figure(9, 3.6)
    axis = figure.subplots()
    before = 0.0
    for stage, log in read_logs(run).items():
        label, colour = STAGES[stage]
        points = [(before + row["epoch"], 100 * row["eval_rsum"]) for row in log if "eval_rsum" in row]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=5, linewidth=2, color=colour, label=label)
        before = max(epoch for epoch, _ in points)
    last, best = points[-1][0], max(rsum for _, rsum in points)
    axis.annotate(f"{best:.1f}", (last, best), xytext=(6, -3), textcoords="offset points", weight="bold", color=colour)
    for name, rsum in FROZEN.items():
        axis.axhline(rsum, color="#999999", linewidth=1, linestyle=":")
        axis.text(last + 1.0, rsum, f"{name}: {rsum}", va="center", fontsize=MEDIUM - 1, color="#555555")
    axis.text(last + 1.0, max(FROZEN.values()) + 12, "on frozen features:", va="center", fontsize=MEDIUM - 1)
    axis.set_xlim(0.5, last + 0.8)
    axis.set_xticks(range(1, int(last) + 1))
    axis.set_xlabel("epoch over 6000 photos")
    axis.set_ylabel("rSum on 1000 other photos")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", frameon=False, fontsize=MEDIUM)
    return figure


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/real-photos.png"))
    given = parser.parse_args()
    save_figure(draw(given.run), given.output)


if __name__ == "__main__":
    main()
