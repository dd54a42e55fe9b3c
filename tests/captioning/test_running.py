import subprocess
import sys
from pathlib import Path

import pytest

from support.forks import forks

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "captioning.py"


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not there")
def test_a_killed_run_ends_with_every_picture_once():
    command = [sys.executable, SCRIPT, "--by", "local", "--images", "60", "--kills", "2"]
    with forks():
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "| local | 60 | 2 | 60 | 0 | 0 |" in run.stdout
