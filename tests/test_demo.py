import json
import subprocess
import sys

import pytest

from d2svse.demo import run_demo

EVALUATE = """
import json, sys
from d2svse import D2SVSE, ImageTextDataset, evaluate
model = D2SVSE.from_pretrained(sys.argv[1] + "/model")
print(json.dumps(evaluate(model, ImageTextDataset.from_manifest(sys.argv[1] + "/scenes/test.jsonl"))))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("demo"), []
    results = run_demo(
        folder,
        num_train=64,
        num_test=12,
        pretrain_epochs=1,
        distill_epochs=1,
        say=lines.append,
        show_progress_bar=False,
    )
    return folder, results, "\n".join(lines)


def test_the_demo_tells_what_it_does_and_leaves_everything_behind(demo):
    folder, results, said = demo
    assert list(results) == ["stage 1", "stage 2", "aligning alone"]
    assert json.loads((folder / "results.json").read_text()) == results
    for name in ("model/model.safetensors", "index/image_text_index.json", "gallery.png", "scenes/test.jsonl"):
        assert (folder / name).is_file(), name
    assert "InfoNCE" in said
    assert "ResNet" in said
    assert said.count("its own scene comes at place") == 3


def test_a_fresh_process_gives_the_same_table(demo):
    folder, results, _ = demo
    found = subprocess.run([sys.executable, "-c", EVALUATE, str(folder)], capture_output=True, text=True, check=True)
    fresh = json.loads(found.stdout.splitlines()[-1])
    assert fresh == pytest.approx(results["stage 2"], abs=1e-6)


def test_the_demo_can_be_run_again_in_the_same_place(demo):
    folder, results, _ = demo
    again = run_demo(
        folder,
        num_train=64,
        num_test=12,
        pretrain_epochs=1,
        distill_epochs=1,
        say=lambda line: None,
        show_progress_bar=False,
    )
    assert again == results
