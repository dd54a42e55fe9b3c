"""The parts of a model that training compiles."""

import pytest
import torch

from d2svse.models.compiled import compiled_parts


@pytest.mark.parametrize(
    "decoder",
    [{"num_tokens": 4, "num_layers": 2, "num_heads": 2}, {"kind": "attention", "num_tokens": 4, "num_heads": 2}],
)
def test_backbones_and_decoder_are_one_graph_each(make_model, decoder):
    model = make_model(context_decoder=decoder).train()
    ids, mask = torch.randint(1, 90, (4, 9)), torch.arange(9) < torch.tensor([[5], [9], [7], [9]])
    calls = [
        (model.image_encoder.backbone, {"pixel_values": torch.randn(4, 3, 32, 32)}),
        (model.text_encoder.backbone, {"input_ids": ids, "attention_mask": mask.long()}),
        (model.decoder.outputs, {"words": torch.randn(4, 9, 24), "mask": mask}),
    ]
    for part, inputs in calls:
        torch.compiler.reset()
        explained = torch._dynamo.explain(part)(**inputs)
        assert (explained.graph_count, explained.break_reasons) == (1, [])
    torch.compiler.reset()


def test_compiled_parts_give_the_same_and_are_plain_again_after_the_block(make_model, val_dataset):
    model = make_model(context_decoder={"num_tokens": 4, "num_layers": 1, "num_heads": 2})
    inputs = model.processor(text=val_dataset.captions[:4], images=val_dataset.images[:4])
    names, graphs = list(model.state_dict()), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    expected = model(**inputs).logits_per_image
    with compiled_parts(model, backend=backend):
        found = model(**inputs).logits_per_image
        assert list(model.state_dict()) == names
    torch.testing.assert_close(found, expected)
    assert len(graphs) == 3
    assert model(**inputs).logits_per_image.equal(expected)
    assert len(graphs) == 3
    assert "outputs" not in vars(model.decoder)
    torch.compiler.reset()
