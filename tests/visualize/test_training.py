import json

import pytest

from d2svse import Trainer
from d2svse.visualize import read_logs, training_curves
from d2svse.visualize.figures import save_figure


@pytest.fixture
def folder(tmp_path):
    """A run whose first stage is done and whose second is under way."""
    done = [{"loss": 2.0, "align_loss": 2.0, "epoch": 0.5, "step": 1}, {"eval_i2t_recall_at_1": 0.25, "epoch": 1.0}]
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in done))
    for stage, step in (("pretrain", 3), ("distill", 9), ("distill", 10)):
        checkpoint = tmp_path / stage / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        rows = [{"loss": 3.0, "align_loss": 2.0, "distill_loss": 1.0, "positive_score": 0.5, "epoch": 0.1 * step}]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    (tmp_path / "distill" / "checkpoints" / "unfinished-checkpoint-11").mkdir()
    return tmp_path


def test_logs_are_those_of_done_stages_and_of_the_newest_checkpoint(folder):
    logs = read_logs(folder)
    assert list(logs) == ["pretrain", "distill"]
    assert [row["epoch"] for row in logs["pretrain"]] == [0.5, 1.0]
    assert [row["epoch"] for row in logs["distill"]] == [1.0]
    assert list(read_logs(folder / "distill")) == ["distill"]
    assert read_logs(folder / "distill" / "checkpoints" / "checkpoint-9")["distill"][0]["epoch"] == pytest.approx(0.9)


def test_curves_are_what_was_logged(folder):
    figure = training_curves(folder)
    drawn = {
        axis.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in figure.axes
    }
    assert drawn["pretrain: losses"] == {"align loss": [[0.5, 2.0]]}  # the sum of one loss is that loss
    assert drawn["distill: losses"] == {
        "align loss": [[1.0, 2.0]], "distill loss": [[1.0, 1.0]], "loss": [[1.0, 3.0]]
    }  # fmt: skip
    assert drawn["distill: mean scores in a batch"] == {"right pairs": [[1.0, 0.5]]}
    recalls = "pretrain: recall on the validation set, percent"
    assert drawn[recalls] == {"i2t R@1": [[1.0, 25.0]]}
    assert drawn["distill: recall on the validation set, percent"] == {}


def test_values_that_were_not_finite_are_left_out(folder):
    with (folder / "pretrain" / "log.jsonl").open("a") as log:
        log.write('{"loss": null, "align_loss": null, "epoch": 0.7}\n{"loss": 1.0, "align_loss": 1.0, "epoch": 0.9}\n')
    axis = training_curves(folder).axes[0]
    assert axis.lines[0].get_xydata().tolist() == [[0.5, 2.0], [0.9, 1.0]]


@pytest.mark.parametrize("name", ["_a", "$\\foo$", "__"])
def test_any_name_of_a_run_is_in_the_legend(folder, name, tmp_path):
    figure = training_curves({name: folder})
    shown = [text.get_text() for axis in figure.axes for text in (axis.get_legend() and axis.get_legend().texts) or ()]
    assert any(name in text for text in shown)
    save_figure(figure, tmp_path / "a.png")


def test_several_runs_share_the_axes_of_a_stage(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "distill").mkdir()
    (other / "distill" / "log.jsonl").write_text(json.dumps({"loss": 5.0, "distill_loss": 5.0, "epoch": 2.0}) + "\n")
    figure = training_curves({"a": folder, "b": other})
    drawn = {axis.get_title(): axis for axis in figure.axes}
    assert len(drawn) == 6  # three axes for each of two stages
    lines = {line.get_label(): line for line in drawn["distill: losses"].lines}
    assert {name: line.get_xydata().tolist() for name, line in lines.items()} == {
        "a: align loss": [[1.0, 2.0]], "a: distill loss": [[1.0, 1.0]], "a: loss": [[1.0, 3.0]],
        "b: distill loss": [[2.0, 5.0]],
    }  # fmt: skip
    assert lines["a: distill loss"].get_linestyle() != lines["b: distill loss"].get_linestyle()
    assert [line.get_label() for line in drawn["pretrain: losses"].lines] == ["a: align loss"]
    named = {line.get_label() for axis in training_curves([folder, other]).axes for line in axis.lines}
    assert {f"{folder.name}: distill loss", f"{other.name}: distill loss"} <= named
    with pytest.raises(ValueError, match="no folder to draw"):
        training_curves([])


def test_a_real_run_is_read(make_model, make_args, train_dataset, val_dataset, tmp_path):
    args = make_args(num_train_epochs=1, save_strategy="epoch")
    Trainer(make_model(), args, train_dataset, val_dataset).train()
    (log,) = read_logs(args.output_dir).values()
    assert any("eval_t2i_recall_at_1" in row for row in log)
    titles = [axis.get_title() for axis in training_curves(args.output_dir).axes if axis.lines]
    assert len(titles) == 3


def test_folders_without_a_log_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_logs(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        read_logs(tmp_path)
    for text, message in (
        ("{", "the log is broken"),
        ('{"log_history": []}', "the log is empty"),
        ("[]", "the log is broken"),
    ):
        (tmp_path / "checkpoint-1").mkdir(exist_ok=True)
        (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_logs(tmp_path)
