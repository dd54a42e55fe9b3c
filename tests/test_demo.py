import json
import shutil

import pytest
import torch

from d2svse.data import read_manifest
from d2svse.demo import build_model, draw_scenes, run_demo
from support.fixtures import SMALL_DEMO
from support.processes import Fork

SPLITS = ("train", "val", "test")
EVALUATE = """
import json, sys
from d2svse import D2SVSE, ImageTextDataset, evaluate
model = D2SVSE.from_pretrained(sys.argv[1] + "/model")
print(json.dumps(evaluate(model, ImageTextDataset.from_manifest(sys.argv[1] + "/scenes/test.jsonl")).rank_metrics))
"""


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_demo_tells_what_it_does_and_leaves_everything_behind(demo):
    said = (demo.parent / "said.txt").read_text()
    assert list(results_of(demo)) == ["stage 1", "stage 2", "aligning alone"]
    for name in ("model/model.safetensors", "index/image_text_index.json", "gallery.png", "scenes/test.jsonl"):
        assert (demo / name).is_file(), name
    assert "InfoNCE" in said
    assert "ResNet" in said
    assert said.count("its scene has rank") == 3


def test_the_run_card_has_the_options_of_the_training(demo):
    card = json.loads((demo / "model" / "run.json").read_text())
    training = card["configuration"]["training"]
    state = json.loads(next((demo / "checkpoints").rglob("trainer_state.json")).read_text())
    assert training["per_device_train_batch_size"] == state["train_batch_size"]
    assert card["metrics"] == {name: results_of(demo)[name] for name in ("stage 1", "stage 2")}


def test_another_process_gives_the_same_table(demo):
    other = Fork(EVALUATE, demo)
    assert other.wait() == 0, other.err()
    assert json.loads(other.out().splitlines()[-1]) == pytest.approx(results_of(demo)["stage 2"], abs=1e-6)


def test_the_demo_can_be_run_again_in_the_same_place(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "demo")
    again = run_demo(tmp_path / "demo", **SMALL_DEMO, say=lambda line: None, show_progress_bar=False)
    assert again == results_of(demo)


def test_all_runs_of_a_demo_take_the_steps_that_it_tells(demo):
    states = [json.loads(path.read_text()) for path in (demo / "checkpoints").rglob("trainer_state.json")]
    assert {state["global_step"] for state in states} == {1, 2}  # an epoch of 64 scenes is one batch, for each stage


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("scenes/train.jsonl", "train.jsonl"),
        ("scenes/test.jsonl", "test.jsonl"),
        ("scenes/train/mine.txt", "scenes/train"),
        ("results.json", "results.json"),
        ("index/notes.txt", "index"),
        ("index/image_text_index.json", "index"),
    ],
)
def test_files_that_no_demo_wrote_stay(name, told, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{"image": "a.jpg", "captions": ["mine"]}\n')
    with pytest.raises(FileExistsError, match=told):
        run_demo(tmp_path, **SMALL_DEMO, say=lambda line: None, show_progress_bar=False)
    assert "mine" in (tmp_path / name).read_text()
    assert not (tmp_path / "checkpoints").exists()


def test_a_demo_that_was_stopped_while_drawing_can_be_run_again(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("d2svse.demo.draw_scenes", stop)
    for split in SPLITS[:2]:
        (tmp_path / "scenes" / split).mkdir(parents=True)
        (tmp_path / "scenes" / split / "000000.png").touch()
    with pytest.raises(KeyboardInterrupt):  # it draws again
        run_demo(tmp_path, **SMALL_DEMO, say=lambda line: None)


@pytest.mark.parametrize("epochs", [0, -1, float("nan")])
def test_epochs_of_the_demo_are_positive(epochs, tmp_path):
    with pytest.raises(ValueError, match="epochs must be positive"):
        run_demo(tmp_path, **{**SMALL_DEMO, "pretrain_epochs": epochs}, say=lambda line: None)


def test_progress_counts_to_the_epochs_of_each_stage(demo):
    states = [json.loads(path.read_text()) for path in (demo / "checkpoints").rglob("trainer_state.json")]
    assert all(state["epoch"] <= state["num_train_epochs"] for state in states)


def test_a_second_accelerator_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("d2svse.demo.choose_device", lambda device: torch.device(device))
    with pytest.raises(ValueError, match="cuda:1: the demo trains on the first accelerator"):
        run_demo(tmp_path, **SMALL_DEMO, device="cuda:1", say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_no_scene_is_in_two_splits(tmp_path):
    assert draw_scenes(tmp_path, num_train=5, num_test=2) == tmp_path
    rows = {split: [record.image.stem for record in read_manifest(tmp_path / f"{split}.jsonl")] for split in SPLITS}
    assert rows == {
        "train": ["000000", "000001", "000002", "000003", "000004"],
        "val": ["000005", "000006"],
        "test": ["000007", "000008"],
    }


def test_the_heads_of_the_text_side_can_be_chosen():
    assert build_model(["a red circle"]).config.text_config.num_attention_heads == 4
    assert build_model(["a red circle"], text_heads=2).config.text_config.num_attention_heads == 2
