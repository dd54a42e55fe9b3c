"""The tables of options in docs/training.md are those of the dataclasses.

`python tests/docs/test_options_table.py` writes them anew.
"""

import dataclasses
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from d2svse.training.options import GROUPS, ModelOptions

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
START, END = "<!-- options: written by tests/docs/test_options_table.py -->\n", "<!-- end of options -->\n"


def takes(hint) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(takes(part) for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is list:
        inner = get_args(hint)[0]
        return f"list of {takes(inner)}" + ("s" if inner in (int, float, str) else "")
    words = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    return words.get(hint, "mapping")


def default_of(field) -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        return "required"
    if default is None or default == []:
        return ""
    return f"`{', '.join(map(str, default)) if isinstance(default, list) else json.dumps(default).strip(chr(34))}`"


def tables() -> str:
    parts = []
    for group in GROUPS:
        hints, lines = get_type_hints(group), []
        for field in dataclasses.fields(group):
            flag = field.metadata["flag"]
            shown = f"--{field.name.replace('_', '-')}" if flag is True else flag or ""
            flags = ", ".join(f"`{word}`" for word in shown.replace("/", " ").split())
            cells = (f"`{field.name}`", flags, takes(hints[field.name]), default_of(field), field.metadata["help"])
            lines.append(f"| {' | '.join(cells)} |\n".replace("|  |", "| |").replace("|  |", "| |"))
        head = "| option | flag | takes | default | what it does |\n| --- | --- | --- | --- | --- |\n"
        parts.append(f"\n{group.__doc__}\n\n{head}{''.join(lines)}")
    return "".join(parts) + "\n"


def split_page() -> tuple[str, str, str]:
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    written, after = rest.split(END)
    return before, written, after


def test_the_page_has_the_tables_of_the_dataclasses():
    assert split_page()[1] == tables()


def test_every_option_says_what_it_does_and_no_name_is_declared_twice():
    fields = [field for group in GROUPS for field in dataclasses.fields(group)]
    assert all(field.metadata["help"].endswith(".") for field in fields)
    assert len({field.name for field in fields}) == len(fields)


def test_what_the_options_say_of_other_declarations_is_true():
    import transformers

    from d2svse import D2SVSEConfig, TrainingArguments
    from d2svse.choices import Engine, ProtocolName
    from d2svse.losses import distillation_loss_names, loss_names
    from d2svse.retrieval.evaluation.protocols import PROTOCOLS
    from d2svse.retrieval.vectors import BACKENDS
    from d2svse.training.options import PRESETS, Preset

    config, model = D2SVSEConfig(), ModelOptions()
    assert (config.embed_dim, config.similarity["name"]) == (model.embed_dim, model.similarity)
    for choices, known in (
        (Engine, BACKENDS),
        (ProtocolName, PROTOCOLS),
        (Preset, PRESETS),
    ):
        assert set(get_args(choices)) == set(known)
    ours = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for name, names in (("loss", loss_names()), ("distill_loss", distillation_loss_names())):
        assert all(one in ours[name].metadata["help"] for one in names)
    theirs = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    own = {field.name for group in GROUPS if GROUPS[group] == "training" for field in dataclasses.fields(group)}
    chosen = {"dataloader_num_workers", "dataloader_persistent_workers"}  # by the device, see choose_workers
    for name in own & theirs.keys() - chosen:
        assert ours[name].default == theirs[name]


if __name__ == "__main__":
    before, _, after = split_page()
    PAGE.write_text(before + START + tables() + END + after, encoding="utf-8")
