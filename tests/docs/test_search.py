"""The examples of docs/search.md."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "search.md"


@pytest.mark.skipif(not DOCS.is_file(), reason="docs/ is not there")
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        if '"milvus"' not in block:
            exec(block, names)
    assert names["ids"] == [["a.jpg", "b.jpg"]]
    assert capsys.readouterr().out.count("exact dtype=") == 3
