import subprocess
import sys

import pytest
import torch

from d2svse import cpu


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("", 64)])
def test_a_containers_quota_bounds_the_cores(monkeypatch, tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cpu, "CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert cpu.usable_cores() == cores


@pytest.mark.parametrize(
    ("processes", "given", "expected"), [(1, None, 8), (4, None, 2), (4, "1", 2), (16, None, 1), (1, "3", None)]
)
def test_processes_share_the_cores_unless_told_otherwise(monkeypatch, processes, given, expected):
    chosen = []
    monkeypatch.setattr(cpu, "usable_cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    cpu.choose_threads()
    assert chosen == ([] if expected is None else [expected])


@pytest.mark.parametrize("name", cpu.ALLOCATOR_VARIABLES)
def test_a_users_own_allocator_settings_are_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not cpu.keep_memory()


@pytest.mark.skipif(cpu.platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_stays_with_the_process():
    script = """
import sys, torch
from d2svse.cpu import keep_memory
assert sys.argv[1] == "plain" or keep_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
block = torch.ones(32 * 2**20)  # 128 MB
del block
print(resident() - before > 100e6)
"""
    for choice, kept in (("plain", "False"), ("keep", "True")):
        command = [sys.executable, "-c", script, choice]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == kept
