"""Average the weights of models that went on from one another (a model soup, Wortsman et al. 2022).

    python benchmarks/average_models.py MODEL MODEL ... -o FOLDER

Each floating-point tensor becomes its mean in float64; the others, the configuration and the processor are the first
model's. Weights of runs that started apart do not lie near each other, and their mean is good for nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from d2svse import D2SVSE


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


def average(folders: list[Path]) -> D2SVSE:
    """The first model, with the mean of all models' weights.

    Raises:
        ValueError: if a model's tensors have other names or shapes than the first one's.
    """
    model = D2SVSE.from_pretrained(folders[0])
    weights = model.state_dict()
    sums = {name: value.double() for name, value in weights.items() if value.is_floating_point()}
    for folder in folders[1:]:
        other = D2SVSE.from_pretrained(folder).state_dict()
        if _shapes(other) != _shapes(weights):
            raise ValueError(f"{folder}: not built like {folders[0]}")
        for name, total in sums.items():
            total += other[name]
    with torch.no_grad():
        for name, total in sums.items():
            weights[name].copy_(total / len(folders))
    return model


def main() -> None:
    """Read the arguments and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("-o", "--output", required=True, type=Path)
    given = parser.parse_args()
    average(given.models).save_pretrained(given.output)


if __name__ == "__main__":
    main()
