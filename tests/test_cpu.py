import threading
from concurrent.futures import ThreadPoolExecutor

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


def test_the_cpu_is_taken_where_there_is_no_accelerator_and_an_unknown_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(cpu, "choose_threads", lambda: None)
    assert cpu.choose_device().type == "cpu"
    for name, message in (("cuda", "device 'cuda' is not here; there is cpu"), ("gpu", "device 'gpu': expected")):
        with pytest.raises(ValueError, match=message):
            cpu.choose_device(name)


def test_the_accelerator_is_taken_where_there_is_one_and_threads_are_chosen_for_the_cpu_alone(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(cpu, "choose_threads", lambda: chosen.append("threads"))
    assert cpu.choose_device().type == "cuda"
    assert cpu.choose_device("cuda:1") == torch.device("cuda:1")
    assert not chosen
    assert cpu.choose_device("cpu").type == "cpu"
    assert chosen == ["threads"]
    with pytest.raises(ValueError, match="device 'cuda:2' is not here"):
        cpu.choose_device("cuda:2")


def test_results_of_threads_keep_the_order_of_the_items_and_few_are_read_ahead(monkeypatch):
    monkeypatch.setattr(cpu, "own_cores", lambda: 3)
    read = []
    items = (read.append(number) or number for number in range(20))
    for place, result in enumerate(cpu.map_in_threads(lambda number: number**2, items, 5)):
        assert result == place**2
        assert len(read) == min(place + 5, 20)
    assert place == 19
    assert list(cpu.map_in_threads(str, [], 5)) == []


@pytest.mark.parametrize("fails", [True, False])
def test_an_error_and_a_close_cancel_the_calls_that_wait(monkeypatch, fails):
    started, ended = [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, **options):
            ended.set()
            super().shutdown(**options)

    def call(number):
        started.append(number)
        if number == 1 and fails:
            raise ValueError("one")
        return number != 2 or ended.wait(60)

    monkeypatch.setattr(cpu, "own_cores", lambda: 1)
    monkeypatch.setattr(cpu, "ThreadPoolExecutor", Pool)
    results = cpu.map_in_threads(call, range(100), 10)
    assert next(results)
    if fails:
        with pytest.raises(ValueError, match="one"):
            next(results)
    else:
        results.close()
    assert started == [0, 1, 2][: len(started)]
