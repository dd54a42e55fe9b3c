"""The notebooks run, are the scripts beside them, and take other data by one path."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d2svse.data import make_scene
from d2svse.losses import base as losses
from d2svse.models.gru import build_tokenizer
from d2svse.similarity import base as similarity
from d2svse.training.arguments import PRESETS

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples/ is not there")
SIDE = 32
FIGURES = dict(zip(NAMES, (2, 1, 1, 0, 0, 8), strict=True))
CHANCE = {  # run as a last cell: what a notebook trains is better than chance
    "01_quickstart": "assert metrics['t2i_recall_at_10'] > 3 * chance['t2i_recall_at_10']",
    "02_two_stages": "assert after['stage 2']['rsum'] > 3 * chance['rsum']",
    "03_similarities": "assert all(one['rsum'] > 2 * chance['rsum'] for one in metrics.values())",
    "04_your_own": "assert all(results[name]['rsum'] > 2.5 * chance['rsum'] for name in models)",
    "05_published_checkpoint": "assert all(one['rsum'] > 2 * chance['rsum'] for one in table.values())",
    "06_looking_inside": "assert min(results[name]['rsum'] for name in ('vectors', 'words')) > 3 * chance['rsum']",
}


def test_six_notebooks_and_no_file_besides_them():
    assert sorted(CHANCE) == NAMES
    assert {path.name for path in EXAMPLES.iterdir()} == {f"{name}.{end}" for name in NAMES for end in ("py", "ipynb")}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script(name):
    jupytext = pytest.importorskip("jupytext", reason="notebooks are made of scripts by jupytext")
    script, notebook = (jupytext.read(EXAMPLES / f"{name}.{end}") for end in ("py", "ipynb"))
    made, kept = ([(cell.cell_type, cell.source) for cell in one.cells] for one in (script, notebook))
    assert made == kept, "run: jupytext --update --to ipynb examples/*.py"
    written = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in written["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "notebooks are kept without outputs"


@pytest.mark.parametrize("name", NAMES)
def test_the_links_of_a_notebook_lead_to_pages(name):
    links = re.findall(r"\]\((?!http)([^)#]+)", (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not (EXAMPLES / link).is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_trains_better_than_chance(name, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="notebooks are read by nbformat")
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbclient")
    pytest.importorskip("ipykernel", reason="notebooks run in a kernel of ipykernel")
    pytest.importorskip("matplotlib", reason="notebooks draw by matplotlib")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = tmp_path / "here"
    here.mkdir()
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHANCE[name]))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(here)}}).execute()
    assert os.listdir(here) == ["d2svse-examples"]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    told = [
        line for output in outputs for line in output.get("text", "").splitlines() if output.get("name") == "stderr"
    ]
    known = ("IProgress not found", "autonotebook import tqdm", "has no teacher", "masks padding", "output as it is")
    assert not [line for line in told if line.strip() and not any(words in line for words in known)]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[name]


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """A folder with photos of another kind and layout, and tiny backbones under the names that the notebooks give."""
    folder = tmp_path_factory.mktemp("other")
    texts = []
    for split, first, count in (("train", 0, 24), ("val", 24, 12), ("test", 36, 12)):
        (folder / "my photos" / "pictures" / split).mkdir(parents=True)
        lines = []
        for number in range(first, first + count):
            scene, path = make_scene(7, number), f"pictures/{split}/{number}.jpg"
            scene.draw(48).resize((60, 48)).save(folder / "my photos" / path)
            lines.append(json.dumps({"image": path, "captions": scene.sparse_captions[: 2 + number % 3]}))
            texts += scene.sparse_captions
        (folder / "my photos" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = build_tokenizer(texts)
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    vision, text = folder / "google/vit-base-patch16-224", folder / "google-bert/bert-base-uncased"
    ViTModel(ViTConfig(**small, image_size=SIDE, patch_size=8), add_pooling_layer=False).save_pretrained(vision)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(vision)
    bert = BertConfig(**small, vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length)
    BertModel(bert, add_pooling_layer=False).save_pretrained(text)
    tokenizer.save_pretrained(text)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_other_data_take_one_path(name, other_data, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="notebooks draw by matplotlib")
    # The notebooks draw them, and it takes its time.
    monkeypatch.setattr(figure.Figure, "savefig", lambda _, path: Image.new("RGB", (1, 1)).save(path))
    code = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    changed, count = re.subn(r"^DATA = None$", f"DATA = {str(other_data / 'my photos')!r}", code, flags=re.MULTILINE)
    assert count == 1
    for part in ("google", "google-bert"):
        (tmp_path / part).symlink_to(other_data / part)
    monkeypatch.chdir(tmp_path)
    for registry in (similarity.REGISTRY, losses.RANKING, losses.DISTILLATION):
        monkeypatch.setattr(registry, "classes", dict(registry.classes))
    for option, value in (("decoder_layers", 1), ("num_context_tokens", 4), ("save_only_model", True)):
        monkeypatch.setitem(PRESETS["recommended"], option, value)  # quicker, and nothing that a script depends on
    exec(compile(changed, f"{name}.py", "exec"), {"__name__": "example"})
    assert sorted(os.listdir(tmp_path)) == ["d2svse-examples", "google", "google-bert"]
    assert not list(tmp_path.glob("d2svse-examples/*/scenes"))
