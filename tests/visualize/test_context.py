import numpy as np
import pytest

from d2svse.visualize import context_neighbours, nearest_dense


@pytest.fixture
def sentences(val_dataset):
    return [record.captions[0] for record in val_dataset.records[:3]]


@pytest.mark.parametrize("own", [None, [2, 0, 1]])
def test_the_nearest_are_found_before_and_after_the_fusion(model, val_dataset, sentences, own):
    dense = val_dataset.dense_captions
    sides = nearest_dense(model, sentences, dense, own, k=4)
    around = model.encode_text(dense, dense=True)
    for side, without in zip(sides, (True, False), strict=True):
        asked = model.encode_text(sentences, dense=without)
        for n in range(3):
            cosines = [float(asked[n] @ vector) for vector in around]
            best = sorted(range(len(dense)), key=lambda row: -cosines[row])[:4]
            assert side.rows[n].tolist() == best
            np.testing.assert_allclose(side.cosines[n], [cosines[row] for row in best], atol=1e-6)
            if own is not None:
                assert side.ranks[n] == 1 + sum(value > cosines[own[n]] for value in cosines)
    assert (sides[0].ranks is None) == (own is None)
    assert not np.allclose(sides[0].cosines, sides[1].cosines)


def test_both_sides_are_drawn_and_the_own_sentence_is_green(model, val_dataset, sentences):
    dense = ["costs $5 or $6, " * 9, *val_dataset.dense_captions]
    figure = context_neighbours(model, sentences, dense, own=[1, 2, 3], k=len(dense))
    sides = nearest_dense(model, sentences, dense, own=[1, 2, 3], k=len(dense))
    for n, axis in enumerate(figure.axes):
        shown = [text.get_text().replace("\n", " ") for text in axis.texts]
        assert shown[0] == sentences[n]
        headings = [text for text in shown if "own dense caption has rank" in text]
        assert headings == [
            f"{name} the decoder's tokens: its own dense caption has rank {side.ranks[n]} of 17"
            for name, side in zip(("without", "with"), sides, strict=True)
        ]
        green = [text.get_text().replace("\n", " ") for text in axis.texts if text.get_color() == "#1a8a3a"]
        assert green[1::2] == [dense[n + 1]] * 2
    figure.savefig("/dev/null", format="png")


def test_what_does_not_fit_is_an_error(model, make_model, sentences):
    dense = ["one", "two"]
    with pytest.raises(ValueError, match="no context decoder"):
        nearest_dense(make_model(), sentences, dense)
    for k in (0, 3):
        with pytest.raises(ValueError, match="k must be from 1 to 2, the number of dense captions"):
            nearest_dense(model, sentences, dense, k=k)
    for own in ([0, 1], [0, 1, 2], [0, -1, 1]):
        with pytest.raises(ValueError, match="own must give one of the 2 rows of dense to each of the 3 sparse"):
            nearest_dense(model, sentences, dense, own, k=1)
