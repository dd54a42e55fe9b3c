import numpy as np
import pytest
import torch

from d2svse.similarity import Cosine, GSSFBlockDiagonal, GSSFDiagonal, MaxMean, Metric
from d2svse.visualize import metric_weights
from d2svse.visualize.metric import montage


def learned(similarity):
    torch.manual_seed(0)
    with torch.no_grad():
        similarity.metric.weight += 0.3 * torch.randn_like(similarity.metric.weight)
    return similarity


def counted(axis) -> list[float]:
    return sorted(sum(bar.get_height() for bar in bars) for bars in axis.containers)


def test_blocks_are_drawn_side_by_side_and_all_weights_are_counted():
    similarity = learned(GSSFBlockDiagonal(12, 6))
    figure = metric_weights(similarity)
    left, middle, right = figure.axes[:3]
    image = left.get_images()[0]
    np.testing.assert_array_equal(image.get_array().filled(np.nan), montage(similarity.metric.weights().numpy()))
    learned_alone = montage(similarity.metric.weights().numpy() - np.eye(2, dtype=np.float32))
    np.testing.assert_array_equal(middle.get_images()[0].get_array().filled(np.nan), learned_alone)
    low, high = image.get_clim()
    assert low == -high  # white is zero
    assert counted(right) == [12, 12]  # six blocks of 2 × 2: two weights on each diagonal, two beside it
    assert left.get_title() == "6 blocks of 2 × 2"


def test_the_montage_holds_every_block_in_order():
    blocks = np.arange(5 * 4, dtype=np.float32).reshape(5, 2, 2)
    canvas = montage(blocks)
    assert canvas.shape == (5, 8)
    for place, block in enumerate(blocks):
        top, left = 3 * (place // 3), 3 * (place % 3)
        np.testing.assert_array_equal(canvas[top : top + 2, left : left + 2], block)
    assert np.isnan(canvas).sum() == canvas.size - blocks.size
    np.testing.assert_array_equal(montage(blocks[:1]), blocks[0])


def test_a_diagonal_is_drawn_as_a_line():
    similarity = learned(GSSFDiagonal(10))
    left, right = metric_weights(similarity.metric).axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), similarity.metric.weights())
    assert counted(right) == [10]


def test_a_metric_of_fragments_and_an_untrained_one():
    figure = metric_weights(MaxMean(metric=Metric("block-diagonal", 8, num_blocks=2)))
    assert figure.axes[0].get_title() == "2 blocks of 4 × 4"
    assert "1.000 ± 0.000" in figure.axes[2].get_legend().get_texts()[1].get_text()


@pytest.mark.parametrize("metric", [Cosine(), MaxMean(), Metric("cosine")])
def test_what_has_no_weights_is_an_error(metric):
    with pytest.raises(ValueError, match="no learned weights"):
        metric_weights(metric)
