import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.images import write_images
from support.processes import fork_command

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "captioning.py"


@pytest.mark.long
def test_a_killed_run_goes_on_and_captions_every_image_once(llava, run, tmp_path):
    images, output = write_images(tmp_path / "images", 40), tmp_path / "dense.jsonl"
    command = ["caption", "local", llava, images, "-o", output, "--temperature", 2, "--max-new-tokens", 24]
    command += ["--dtype", "float32", "--device", "cpu", "--batch-size", 2, "--tries", 20]
    process = fork_command(*command)
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.err()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = output.read_text(encoding="utf-8").splitlines()[:5]
    code, _, errors = run(*command)
    assert code == 0, errors
    lines = output.read_text(encoding="utf-8").splitlines()
    assert lines[:5] == kept
    assert sorted(json.loads(line)["image"] for line in lines) == sorted(path.name for path in images.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not there")
def test_a_run_that_is_killed_twice_captions_every_image_once():
    command = [sys.executable, SCRIPT, "--by", "local", "--images", "60", "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| local | 60 | 2 | 60 | 0 | 0 |" in done.stdout
