"""The gradient of chunks is that of the whole batch, whatever is frozen."""

import pytest
import torch

from d2svse.data import Batch
from d2svse.losses import InfoNCE
from d2svse.training.gradcache import cached_backward
from d2svse.training.tasks import AlignTask, total_loss


@pytest.mark.parametrize("frozen", [("image_encoder", "text_encoder"), ("image_encoder",), ("similarity_fn",)])
@pytest.mark.parametrize("name", ["gssf-diagonal", "max-mean"])
def test_chunks_have_the_gradient_of_the_batch_where_parts_are_frozen(make_model, processor, frozen, name):
    options = {} if name == "gssf-diagonal" else {"metric": "diagonal"}
    model, task = make_model(similarity={"name": name, **options}), AlignTask(InfoNCE(0.1))
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = processor(text=["a red circle", "a blue square", "a green star on the left"])
    batch = Batch(pixel_values=pixels, image_ids=torch.arange(3), valid=torch.ones(3, dtype=torch.bool), **texts)
    total_loss(task(model, batch)).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cached_backward(model, task, batch, 2, lambda loss: loss.backward())
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)
