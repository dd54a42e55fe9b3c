"""The context decoder in a similarity of tokens: its tokens join the words, or its output is added to each word."""

import pytest
import torch
from PIL import Image

from d2svse import D2SVSE, Features, TrainingArguments
from d2svse.losses import InfoNCE
from d2svse.training.building import check_stage
from d2svse.visualize import alignment_maps, look_at

DECODER = {"num_tokens": 4, "num_layers": 1, "num_heads": 2}
TEXTS = ["a red circle", "a green star on the left of a blue square"]


def scores_of(model: D2SVSE, texts: list[str] = TEXTS) -> torch.Tensor:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(pixel_values=pixels, **model.processor(text=texts)).logits_per_image


def randomise(model: D2SVSE) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", ["max-mean", "scan-t2i", "movers", "omit"])
@pytest.mark.parametrize("how", ["join", "add"])
def test_the_decoder_reaches_the_scores(name, how, make_model):
    model = make_model(similarity=name, context_decoder=DECODER, context_tokens=how).eval()
    before = scores_of(model)
    randomise(model)
    assert (scores_of(model) - before).abs().min() > 1e-5


@pytest.mark.parametrize("name", ["max-mean", "scan-t2i", "movers", "omit"])
def test_stage_2_trains_the_decoder_by_the_ranking_loss(name, make_model):
    model = make_model(similarity=name)
    model.add_decoder(**DECODER)
    assert model.config.context_tokens == "join"
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = model(pixel_values=pixels, **model.processor(text=TEXTS))
    InfoNCE(0.1)(model.similarity_fn(output.image_features, output.text_features)).backward()
    assert all(
        parameter.grad.abs().sum() > 0 for name, parameter in model.decoder.named_parameters() if "weight" in name
    )


def test_joined_tokens_are_the_outputs_of_the_decoder_behind_the_words(make_model):
    model = make_model(similarity="max-mean", context_decoder=DECODER, context_tokens="join").eval()
    texts = model.encode_text(TEXTS, output="features", convert_to_tensor=True)
    dense = model.encode_text(TEXTS, output="features", convert_to_tensor=True, dense=True)
    for row, text in enumerate(TEXTS):
        words = dense[row : row + 1].tokens[:, : int(dense.mask[row].sum())]
        expected = torch.cat([words, model.decoder.outputs(words)], dim=1)
        torch.testing.assert_close(texts.tokens[row][texts.mask[row]], expected[0], atol=1e-5, rtol=1e-5)
        alone = model.encode_text([text], output="features", convert_to_tensor=True)
        torch.testing.assert_close(alone.tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("how", "num_tokens"), [("join", 4), ("join", 0), ("add", 4)])
def test_groups_of_texts_and_a_saved_model_give_the_same(how, num_tokens, make_model, tmp_path):
    decoder = {**DECODER, "num_tokens": num_tokens}
    model = make_model(similarity="max-mean", context_decoder=decoder, context_tokens=how).eval()
    texts = [f"{'a very ' * (row % 7)}red circle" for row in range(64)]
    encoded, pixels = model.processor(text=texts), torch.rand(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        one = model(pixel_values=pixels, **encoded).logits_per_image
        many = model(pixel_values=pixels, **encoded, text_groups=4).logits_per_image
        again = D2SVSE.from_pretrained(tmp_path).eval()(pixel_values=pixels, **encoded).logits_per_image
    torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-5)
    assert torch.equal(again, one)


def test_an_added_output_behind_a_closed_gate_changes_nothing(make_model):
    model = make_model(similarity="max-mean", context_gate=True).eval()
    before = scores_of(model)
    model.add_decoder(**DECODER)
    assert model.config.context_tokens == "add"
    assert torch.equal(scores_of(model.eval()), before)
    with pytest.raises(ValueError, match="context_tokens join appends tokens that context_gate cannot close"):
        make_model(context_gate=True, context_tokens="join")


def test_a_decoder_that_cannot_reach_the_scores_is_refused(make_model, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), stage="distill", context_tokens="none")
    for name in ("cosine", "omit"):  # they compare pooled texts
        check_stage(make_model(similarity=name), arguments, InfoNCE(0.1), None)
    with pytest.raises(ValueError, match="the decoder cannot reach the scores of CrossAttentionT2I"):
        check_stage(make_model(similarity="scan-t2i"), arguments, InfoNCE(0.1), None)


@pytest.mark.parametrize("name", ["max-mean", "scan-i2t", "omit"])
def test_maps_tell_the_share_of_the_context(name, make_model):

    model = make_model(similarity=name, context_decoder=DECODER, context_tokens="join").eval()
    pair = look_at(model, Image.new("RGB", (32, 32)), "a red circle")
    assert [position for label, position in pair.words.special if label == "the context"] == [5, 6, 7, 8]
    maps = alignment_maps(model.similarity_fn, pair.images, pair.texts, pair.grid, pair.words)
    remarks = " ".join(remark for one in maps for remark in one.remarks)
    assert "the context take" in remarks
    assert isinstance(pair.texts, Features)
