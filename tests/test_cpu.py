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
