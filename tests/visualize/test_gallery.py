import numpy as np
import pytest
import torch

from d2svse.images import load_image
from d2svse.retrieval import compose_gallery
from d2svse.retrieval.search.gallery import CAPTION_WIDTH, GAP
from d2svse.visualize import retrieval_gallery
from d2svse.visualize.gallery import first_answers

GREEN = (0x1A, 0x8A, 0x3A)
OWNER = np.array([0, 0, 1, 2, 3])
SCORES = np.array(
    [[0.9, 0.1, 0.5, 0.2, 0.1], [0.8, 0.7, 0.5, 0.3, 0.2], [0.1, 0.6, 0.4, 0.9, 0.3], [0.0, 0.5, 0.3, 0.1, 0.9]]
)
CAPTIONS = ["first", "costs $5 or $6", "third", "fourth", "a $\\frac$ very long one " * 12]


@pytest.fixture
def pictures(val_dataset):
    return val_dataset.images[:4]


def corner(canvas, row, column):
    return canvas.getpixel((CAPTION_WIDTH + column * (144 + GAP), GAP + row * (144 + GAP)))


def test_pictures_stand_in_the_order_of_their_scores_and_the_right_one_is_framed(pictures):
    figure = retrieval_gallery(pictures, CAPTIONS, SCORES, OWNER, [1, 3, 2], k=3)
    drawn = figure.axes[0].get_images()[0].get_array()
    rows = [
        ("costs $5 or $6 [right at 4]", (1, 2, 3)),
        ("fourth [right at 1]", (2, 1, 0)),
        ("third [right at 2]", (0, 1, 2)),
    ]
    expected = compose_gallery([(text, [pictures[i] for i in best]) for text, best in rows], right=[[], [0], [1]])
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))


def test_frames_lie_around_the_right_pictures_alone(pictures):
    rows = [("one", pictures[:3]), ("two", pictures[:2])]
    canvas = compose_gallery(rows, right=[{1}, set()])
    plain = compose_gallery(rows)
    assert corner(canvas, 0, 1) == GREEN
    for row, column in ((0, 0), (0, 2), (1, 0), (1, 1)):
        assert corner(canvas, row, column) == corner(plain, row, column)
    with pytest.raises(ValueError, match="right answers of 1 rows were given for 2"):
        compose_gallery(rows, right=[{0}])


def test_sentences_of_a_picture_are_green_where_they_are_right(pictures):
    figure = retrieval_gallery(pictures, CAPTIONS, SCORES, OWNER, [0, 3], "i2t", k=3)
    left, beside, _, last = figure.axes
    np.testing.assert_array_equal(left.get_images()[0].get_array(), np.asarray(load_image(pictures[0])))
    assert left.get_title() == "right at 1"
    shown = [(text.get_text().replace("\n", " "), text.get_color()) for text in beside.texts]
    assert [text for text, _ in shown[1::2]] == ["first", "third", "fourth"]
    assert shown[0] == ("1✓", "#1a8a3a")
    assert {colour for _, colour in shown[2:]} == {"#555555"}
    assert last.texts[1].get_text().replace("\n", " ") == CAPTIONS[4].strip()
    figure.savefig("/dev/null", format="png")


def test_a_tie_counts_against_the_right_answer():
    assert first_answers(np.array([0.5, 0.9, 0.5, 0.5]), np.array([True, False, False, False]), 3) == [1, 2, 3]
    assert first_answers(np.array([0.5, 0.9]), np.array([True, False]), 9) == [1, 0]


def test_rows_and_scores_of_any_kind_are_drawn(pictures):
    scores = torch.tensor(SCORES).bfloat16()
    for queries in (np.array([0, 1]), torch.tensor([1]), range(2)):
        retrieval_gallery(pictures, CAPTIONS, scores, OWNER, queries)


def test_bad_requests_are_refused(pictures):
    with pytest.raises(ValueError, match="do not fit 3 images"):
        retrieval_gallery(pictures[:3], CAPTIONS, SCORES, OWNER, [0])
    for queries in ([5], [-1], []):
        with pytest.raises(ValueError, match="queries must be rows from 0 to 4"):
            retrieval_gallery(pictures, CAPTIONS, SCORES, OWNER, queries)
    with pytest.raises(ValueError, match="direction must be one of t2i, i2t"):
        retrieval_gallery(pictures, CAPTIONS, SCORES, OWNER, [0], "both")
    with pytest.raises(ValueError, match="is NaN"):
        retrieval_gallery(pictures, CAPTIONS, np.full_like(SCORES, np.nan), OWNER, [0])
