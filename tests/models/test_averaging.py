"""Averages of models and interpolation between two states."""

import pytest
import torch

from d2svse import D2SVSE
from d2svse.models.averaging import average_models, interpolate


def test_the_mean_is_that_of_every_weight(make_model, tmp_path):
    models = [make_model(seed) for seed in range(3)]
    states = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    shares = [1, 2, 5]
    averaged = average_models([tmp_path / str(number) for number in range(3)], shares)
    for name, value in averaged.state_dict().items():
        parts = [state[name] for state in states]
        if value.is_floating_point():
            expected = sum(share * part.double() for share, part in zip(shares, parts, strict=True)) / 8
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-7)
        else:
            torch.testing.assert_close(value, parts[0])
    assert averaged.processor is not None


@pytest.mark.parametrize(
    ("weights", "message"), [([1], "one for each"), ([0, 0], "sum must be positive"), ([2, -1], "not be negative")]
)
def test_weights_that_do_not_fit_are_refused(make_model, weights, message):
    with pytest.raises(ValueError, match=message):
        average_models([make_model(0), make_model(1)], weights)


@pytest.mark.parametrize("metric", [None, "dense"])
def test_the_mean_of_lora_is_that_of_the_merged_weights(make_model, tmp_path, metric):
    """The second model has no LoRA, and the third comes from a folder."""
    models = [make_model() for _ in range(3)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        if seed != 1:
            model.add_lora("text", rank=2, metric=metric)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or seed == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
    models[2].save_pretrained(tmp_path)
    given = {name: value.clone() for name, value in models[0].state_dict().items()}
    averaged = average_models([models[0], models[1], tmp_path])
    assert averaged.config.lora is None
    assert all(torch.equal(value, given[name]) for name, value in models[0].state_dict().items())
    assert models[0].config.lora
    for model in (models[0], models[2]):
        model.merge_lora()
    expected = [sum(parts) / 3 for parts in zip(*(model.parameters() for model in models), strict=True)]
    torch.testing.assert_close([*averaged.parameters()], expected, rtol=0, atol=1e-6)


def test_bottlenecks_are_refused(make_model):
    models = [make_model(), make_model()]
    models[1].add_lora("vision", rank=2, kind="bottleneck")
    with pytest.raises(ValueError, match="the vision backbone has bottleneck adapters, which cannot be merged"):
        average_models(models)


def test_models_of_other_shapes_are_refused_by_the_tensor(make_model):
    with pytest.raises(ValueError, match=r"projection\.weight is \(24, 32\) and \(16, 32\)"):
        average_models([make_model(0), make_model(1, embed_dim=16)])
    with pytest.raises(ValueError, match="has no tensor decoder"):
        average_models([make_model(0), make_model(1, context_decoder={"num_tokens": 2, "num_heads": 2})])
    with pytest.raises(ValueError, match="two models or more"):
        average_models([make_model(0)])


def test_the_ends_of_an_interpolation_are_the_states_to_the_bit(make_model):
    start, end = make_model(0).state_dict(), make_model(1).state_dict()
    for share, state in ((0, start), (1, end)):
        assert all(torch.equal(value, state[name]) for name, value in interpolate(start, end, share).items())
    middle = interpolate(start, end, 0.25)
    for name, value in middle.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * end[name])


def test_the_command_writes_a_model(make_model, tmp_path, run):
    for seed in range(2):
        make_model(seed).save_pretrained(tmp_path / str(seed))
    code, _, err = run("average", tmp_path / "0", tmp_path / "1", "--weights", "0,1", "-o", tmp_path / "mean")
    assert (code, err) == (0, "")
    mean, second = D2SVSE.from_pretrained(tmp_path / "mean"), make_model(1)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in mean.state_dict().items())
    code, _, err = run("average", tmp_path / "0", tmp_path / "1", "--weights", "a,b", "-o", tmp_path / "mean")
    assert code == 2
    assert "--weights takes numbers" in err
