"""Values of options: their types, and what an error says of a wrong one."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest

from d2svse.choices import check_counts, check_positive, check_type, check_types, unknown

Mode = Literal["sum", "hardest"]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (np.int64(1), int),
        (1, float),
        ("sum", Mode),
        (None, Mode | None),
        (1, int | str | None),
        ([1, 2], list[int]),
        ((1, 2), list[int]),
        ({"a": 1}, dict[str, int]),
        ({"a": 1}, Mapping[str, int]),
        (object(), Any),
    ],
)
def test_a_value_of_its_type_passes(value, hint):
    check_type("option", value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (True, int, "a whole number, got True"),
        (1.5, int, "a whole number, got 1.5"),
        ("1", float, "a number, got '1'"),
        (1, bool, "true or false, got 1"),
        (1, str, "a text, got 1"),
        ("some", Mode, "one of sum, hardest, got 'some'"),
        (None, Mode, "one of sum, hardest, got None"),
        (1.5, int | str | None, "a whole number or a text, got 1.5"),
        ([1, "2"], list[int], "a list of whole numbers, got [1, '2']"),
        ([1], Mapping[str, int], "a mapping, got [1]"),
        ([1], dict, "a mapping, got [1]"),
        ("x", int | slice, "a whole number or a slice, got 'x'"),
    ],
)
def test_a_value_of_another_type_is_named(value, hint, wanted):
    with pytest.raises(ValueError, match="must be") as caught:
        check_type("option", value, hint)
    assert str(caught.value) == f"option must be {wanted}"


def test_several_options_are_checked_and_unknown_ones_left():
    hints = {"width": int, "mode": Mode}
    check_types({"width": 3, "mode": "sum", "other": object()}, hints)
    with pytest.raises(ValueError, match="mode must be one of sum, hardest, got null"):
        check_types({"mode": None}, hints)
    with pytest.raises(ValueError, match=r"^c\.yaml: mode must be one of sum, hardest, got 3$"):
        check_types({"width": 3, "mode": 3}, hints, "c.yaml: ")


@pytest.mark.parametrize("number", [0, -1, -0.5, float("nan")])
def test_a_number_that_is_not_positive_is_named(number):
    check_positive(width=1, share=1e-9, most=float("inf"))
    with pytest.raises(ValueError, match=f"share must be positive, got {number}"):
        check_positive(width=1, share=number)


def test_an_unknown_name_has_its_nearest_one():
    assert unknown("loss", "hing", ["infonce", "hinge"]).endswith("did you mean hinge? expected one of infonce, hinge")
    assert unknown("loss", "x", ["infonce"], "see the docs") == "unknown loss 'x'; see the docs"


@pytest.mark.parametrize("number", [0, -1])
def test_a_count_that_is_not_positive_is_named(number):
    check_counts(k=1, batch_size=np.int64(3))
    with pytest.raises(ValueError, match=f"k must be positive, got {number}"):
        check_counts(batch_size=1, k=number)


@pytest.mark.parametrize("number", [0.5, 2.0, True, None, "2"])
def test_a_count_that_is_not_whole_is_named(number):
    with pytest.raises(ValueError, match=f"k must be a whole number, got {number!r}"):
        check_counts(batch_size=1, k=number)


def test_a_wrong_choice_has_its_nearest_one():
    with pytest.raises(ValueError, match="option must be one of sum, hardest, got 'hardst'; did you mean hardest"):
        check_type("option", "hardst", Mode)
    check_type("option", np.array(["hardest"])[0], Mode)
    with pytest.raises(ValueError, match="option must be one of 0, 2, got True"):
        check_type("option", True, Literal[0, 2])
