"""Folders of models: which files are read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2svse.hub.folder import check_contents


@pytest.mark.parametrize("name", ["data_config.json", "config_sentence_transformers.json", "train_config.json"])
def test_a_list_in_a_file_that_is_not_read_does_not_stand_in_the_way(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / name).write_text(json.dumps([{"name": "stackexchange.jsonl.gz", "lines": 10009, "weight": 1}]))

    check_contents(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_list_in_a_file_that_is_read_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[1]")

    with pytest.raises(ValueError, match=rf"{name}: expected a JSON object, got list"):
        check_contents(tmp_path)
