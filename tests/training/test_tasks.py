import pytest
import torch

from d2svse.losses import InfoNCE
from d2svse.training.tasks import PretrainTask


def batch(processor):
    texts = processor(text=["a red circle", "a blue square", "a green star on the left"])
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pictures, "image_ids": torch.arange(3), **texts}


@pytest.mark.parametrize("name", ["gssf-diagonal", "gssf-block-diagonal", "max-softmax", "max-lse", "scan-t2i"])
def test_every_similarity_trains_saves_and_scores_the_same(make_model, processor, tmp_path, name):
    from d2svse import D2SVSE

    model = make_model(similarity={"name": name})
    losses = PretrainTask(InfoNCE(0.1))(model, batch(processor))
    losses["align_loss"].backward()
    gradients = [parameter.grad for parameter in model.similarity_fn.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        for parameter in model.similarity_fn.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path)
    loaded, given = D2SVSE.from_pretrained(tmp_path), batch(processor)
    given.pop("image_ids")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits_per_image, model(**given).logits_per_image)


def test_a_weight_penalty_is_part_of_the_loss(make_model, processor):
    model = make_model(similarity={"name": "gssf-dense", "weight_penalty": 0.5})
    losses = PretrainTask(InfoNCE(0.1))(model, batch(processor))
    assert losses["penalty_loss"].item() == pytest.approx(0.5 * model.config.embed_dim)
    assert "penalty_loss" not in PretrainTask(InfoNCE(0.1))(make_model(), batch(processor))
