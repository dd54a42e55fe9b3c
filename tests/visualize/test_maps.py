"""What is drawn: the very maps, over the part of the picture that the model sees."""

import sys

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from d2svse import D2SVSEProcessor
from d2svse.similarity import CrossAttentionI2T
from d2svse.visualize import MapSet, Panel, alignment_maps, draw_maps, explain, look_at
from d2svse.visualize.figures import check_figure_path, save_figure

SENTENCE = "a red circle and a blue star"
BROKEN = "$\\frac$"  # matplotlib would raise if it took it for a formula


def heat(figure) -> dict[str, list]:
    """By its title, the pictures drawn in each panel: the grey picture and the heat over it."""
    return {axis.get_title(): axis.get_images() for axis in figure.axes if len(axis.get_images()) == 2}


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))


def test_the_heat_is_the_map_and_lies_over_the_whole_picture(make_model, val_dataset):
    model = make_model(similarity={"name": "omit"})
    picture = Image.open(val_dataset.images[0]).convert("RGB").resize((64, 40))
    pair = look_at(model, picture, SENTENCE)
    assert pair.grid == (4, 4, 1)
    words, unmatched = alignment_maps(model.similarity_fn, pair.images, pair.texts, pair.grid, pair.words)
    figure = explain(model, picture, SENTENCE)
    drawn = heat(figure)
    assert set(drawn) == {*SENTENCE.split(), "the text's bin"}
    for panel in (*words.panels[1:3], *unmatched.panels):
        grey, over = drawn[panel.title]
        np.testing.assert_allclose(over.get_array(), panel.values)
        assert grey.get_extent() == [0, 64, 40, 0]
        assert over.get_extent() == pytest.approx([0, 64, 40, 0], abs=0.7)
    assert drawn["red"][1].get_clim() == drawn["star"][1].get_clim()  # one scale for all words
    score = float(model.similarity(pair.images, pair.texts))
    assert f"OMIT: {score:.3f}" in texts(figure)
    assert words.remarks[0] in texts(figure).replace("\n", " ")


def test_a_crop_is_drawn_where_it_was_cut(make_model):
    model = make_model(similarity={"name": "scan-t2i"})
    size = {"height": 32, "width": 32}
    cropping = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    model.processor = D2SVSEProcessor(cropping, model.processor.tokenizer)
    picture = Image.new("RGB", (120, 60), "red")
    _, over = heat(explain(model, picture, SENTENCE))["red"]
    assert over.get_extent() == pytest.approx([30, 90, 60, 0], abs=2)


def test_some_words_and_another_similarity(make_model, val_dataset):
    model = make_model()
    figure = explain(
        model, val_dataset.images[0], SENTENCE, similarity=CrossAttentionI2T(), words=["star", "Red"]
    )  # fmt: skip
    assert list(heat(figure)) == ["red", "star"]
    assert "CrossAttentionI2T: " in texts(figure)
    with pytest.raises(ValueError, match="'cat' is not a word of the text"):
        explain(model, val_dataset.images[0], SENTENCE, words=["cat"])
    assert list(heat(explain(model, val_dataset.images[0], SENTENCE))) == ["the whole text"]


def test_a_score_is_drawn_without_dropout_when_the_model_still_trains(make_model, val_dataset):
    model = make_model(similarity={"name": "gssf-dense", "dropout": 0.5})
    expected = texts(explain(model, val_dataset.images[0], SENTENCE))
    assert texts(explain(model.train(), val_dataset.images[0], SENTENCE)) == expected


def test_a_learned_metric_is_drawn_without_a_warning(make_model, val_dataset, recwarn):
    figure = explain(make_model(similarity={"name": "gssf-diagonal"}), val_dataset.images[0], SENTENCE)
    assert "GSSFDiagonal: " in texts(figure)
    assert not list(recwarn)


def test_frames_lie_on_their_patches_and_nothing_is_drawn_where_there_is_no_value():
    values = np.array([[np.nan, 0.5, 1.0], [0.25, 0.0, np.nan]])
    sets = [MapSet("maps", "score", (Panel("word", values, "note", ((1, 2),)),), ("a remark",), shares=False)]
    figure = draw_maps(Image.new("RGB", (60, 40)), sets, (0, 10, 60, 30))
    axis = next(axis for axis in figure.axes if axis.get_title() == "word")
    over, frame = axis.get_images()[1], axis.patches[0]
    assert over.get_extent() == [0, 60, 30, 10]
    assert (over.get_alpha() == 0).tolist() == np.isnan(values).tolist()
    assert over.get_alpha()[0, 2] > over.get_alpha()[1, 0]
    assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == (40, 20, 20, 10)
    assert over.get_clim() == (0, 1)
    with pytest.raises(ValueError, match="no maps"):
        draw_maps(Image.new("RGB", (4, 4)), [])


@pytest.mark.parametrize("values", [np.full((1, 1), 0.3), np.full((2, 2), np.nan), np.zeros((2, 2))])
def test_maps_without_range_are_drawn(values, tmp_path):
    sets = [MapSet("maps", "score", (Panel(BROKEN, values, BROKEN),), (BROKEN,), shares=False)]
    save_figure(draw_maps(Image.new("RGB", (40, 300)), sets, title=BROKEN), tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as image:
        assert image.width > 300


def test_pyplot_is_not_touched(make_model, val_dataset):
    loaded = "matplotlib.pyplot" in sys.modules
    explain(make_model(), val_dataset.images[0], SENTENCE)
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"map.pgf: give a name"):  # it needs TeX, which is missed after the work
        check_figure_path(tmp_path / "map.pgf")
    with pytest.raises(ValueError, match=r"map.xyz: give a name that ends in one of .*\.png"):
        save_figure(draw_maps(Image.new("RGB", (4, 4)), [MapSet("m", "u", (Panel("w", np.ones((1, 1))),))]),
                    tmp_path / "map.xyz")  # fmt: skip
    assert not list(tmp_path.iterdir())
