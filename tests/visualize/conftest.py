import pytest

pytest.importorskip("matplotlib", reason="visualize needs matplotlib (d2svse[visualize])")
