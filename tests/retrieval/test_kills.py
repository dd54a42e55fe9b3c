import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "index_kills.py"


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not there")
def test_a_killed_writer_leaves_the_index_as_it_was_or_as_it_was_to_be():
    run = subprocess.run([sys.executable, SCRIPT, "--kills", "6"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 times between" in run.stdout
