"""Time and memory of converting published checkpoints of base size (random weights).

    python benchmarks/convert_published.py

Each checkpoint is written in the published layout: ViT-B/16 or Swin-B with BERT-base and, in stage
2, 100 learnable tokens in 4 decoder layers and the teacher. A fresh process then converts it, another loads
the folder and encodes a picture and a sentence. Memory is the peak resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {  # kind, resolution, size of the ViT or window of the Swin, stage
    "vit-224": ("vit", 224, 224, 2),
    "vit-384": ("vit", 384, 384, 2),
    "swin-224": ("swin", 224, 7, 2),
    "swin-384": ("swin", 384, 12, 2),
    "vit-224-stage-1": ("vit", 224, 224, 1),
}

STEP = """
import json, resource, sys, time
import numpy as np
from d2svse import D2SVSE
from d2svse.published import convert_published
what, source, target = sys.argv[1:4]
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
result = {}
if what == "convert":
    convert_published(source, target, tokenizer=sys.argv[4])
else:
    model = D2SVSE.from_pretrained(source)
    picture = np.random.default_rng(0).integers(0, 255, (375, 500, 3), dtype=np.uint8)
    image, text = model.encode_image(picture), model.encode_text("a dog runs on the beach")
    assert image.shape == text.shape == (1, 512) and np.isfinite(image @ text.T).all()
    size = model.config.vision_config.image_size
    result = {"image_size": size, "input": model.processor.image_processor.size["height"]}
result["seconds"] = time.perf_counter() - start
result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
result["imports_mb"] = base / 1024
print(json.dumps(result))
"""


def write_checkpoint(path: Path, kind: str, resolution: int, detail: int, stage: int, layers: int = 12) -> None:
    """Write a random checkpoint of base size in the published layout; `layers` are of BERT and of a ViT."""
    import torch
    from transformers import BertConfig, SwinConfig, ViTConfig

    from d2svse import D2SVSE, D2SVSEConfig
    from d2svse.published.names import published_shapes

    if kind == "vit":
        vision = ViTConfig(image_size=detail, num_hidden_layers=layers)
    else:
        heads = {"depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
        vision = SwinConfig(embed_dim=128, window_size=detail, image_size=resolution, **heads)
    decoder = {"num_tokens": 100, "num_layers": 4, "placement": "postfix", "positions": False, "mask_padding": False}
    config = D2SVSEConfig(
        vision_config=vision.to_dict(),
        text_config=BertConfig(num_hidden_layers=layers).to_dict(),
        text_projection="residual_mlp",
        context_decoder=decoder if stage == 2 else None,
    )
    with torch.device("meta"):
        shapes = published_shapes(D2SVSE(config), teacher=stage == 2)
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.long)
        else:
            state[name] = torch.randn(shape).mul_(0.02).add_(1.0 if name.endswith("running_var") else 0.0)
    opt = argparse.Namespace(img_res=resolution, vit_type=kind, no_res_embed=True, distill=True, embed_size=512)
    torch.save({"model": state, "opt": opt, "epoch": 0, "best_rsum": 0.0, "Eiters": 0}, path)


def step(*arguments: object) -> dict[str, float]:
    """Run a step in a fresh process."""
    command = [sys.executable, "-c", STEP, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=", ".join(SIZES))
    parser.add_argument("--layers", type=int, default=12, help="of BERT and of a ViT; fewer for a quick look")
    arguments = parser.parse_args()
    print("| checkpoint | file MB | convert s | peak MB | peak / file | load and encode s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer, checkpoint, model = (Path(folder) / part for part in ("tokenizer", "m.pth", "model"))
            from d2svse.models.gru import build_tokenizer

            build_tokenizer(["a dog runs on the beach"]).save_pretrained(tokenizer)
            write = f"c.write_checkpoint(c.Path({str(checkpoint)!r}), *c.SIZES[{name!r}], layers={arguments.layers})"
            writer = f"import convert_published as c; {write}"
            subprocess.run([sys.executable, "-c", writer], check=True, cwd=Path(__file__).parent)
            size = checkpoint.stat().st_size / 2**20
            converted = step("convert", checkpoint, model, tokenizer)
            loaded = step("load", model, "-")
            assert loaded["input"] == SIZES[name][1]
            print(
                f"| {name} | {size:.0f} | {converted['seconds']:.1f} | {converted['peak_mb']:.0f} "
                f"| {converted['peak_mb'] / size:.2f} | {loaded['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
