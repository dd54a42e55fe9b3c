"""Which weights decay."""

import pytest

from d2svse.training.building import parameter_groups


def decaying(model, args) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, args, set(names.values()))
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}


def test_what_a_pattern_names_does_not_decay(model, make_args):
    every = decaying(model, make_args(weight_decay=0.1))
    assert "decoder.tokens" in every
    args = make_args(weight_decay=0.1, weight_decay_exclude=["decoder.tokens", "image_encoder.*"])
    left = {name for name in every if name != "decoder.tokens" and not name.startswith("image_encoder.")}
    assert decaying(model, args) == left
    assert left < every


def test_a_pattern_that_matches_nothing_is_named(model, make_args):
    args = make_args(weight_decay=0.1, weight_decay_exclude=["decoder.token"])
    with pytest.raises(ValueError, match=r"weight_decay_exclude: no weight has a name like 'decoder\.token'"):
        decaying(model, args)


def test_stage_1_takes_patterns_of_the_decoder_that_stage_2_adds(make_model, make_args):
    plain = make_model()
    every = decaying(plain, make_args(weight_decay=0.1))
    args = make_args(weight_decay=0.1, weight_decay_exclude=["decoder.tokens", "*.layers.0.linear?.weight"])
    assert decaying(plain, args) == every
    for stage, pattern in (("pretrain", "decoder.token"), ("align", "decoder.tokens")):
        with pytest.raises(ValueError, match=rf"no weight has a name like '{pattern}'"):
            decaying(plain, make_args(stage, weight_decay=0.1, weight_decay_exclude=[pattern]))
