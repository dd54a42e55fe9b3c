"""Checkpoint files of unknown origin: nothing in them is run, and they take no more memory than they are large."""

import argparse
import collections
import contextlib
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from d2svse.published.checkpoint import read_checkpoint

SIDES = {"img_enc.fc.weight": torch.ones(3, 2), "txt_enc.fc.weight": torch.ones(3)}


def save(path, state=None, protocol=2, **opt):
    torch.save({"model": state or SIDES, "opt": argparse.Namespace(**opt)}, path, pickle_protocol=protocol)
    return path


class Calls:
    """What a pickle calls when it is read."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod.module._orig_mod."]
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    path = save(tmp_path / "a.pth", {prefix + name: tensor for name, tensor in SIDES.items()})
    assert list(read_checkpoint(path).weights) == list(SIDES)


@pytest.mark.parametrize("place", ["img_enc._orig_mod.fc.weight", "img_enc.module.fc.weight"])
def test_wrappers_within_are_taken_off_and_two_of_a_name_are_told(tmp_path, place):
    state = {place: SIDES["img_enc.fc.weight"], "txt_enc.fc.weight": SIDES["txt_enc.fc.weight"]}
    assert list(read_checkpoint(save(tmp_path / "a.pth", state)).weights) == list(SIDES)
    with pytest.raises(ValueError, match=r"img_enc\.fc\.weight is there twice"):
        read_checkpoint(save(tmp_path / "b.pth", {**state, "img_enc.fc.weight": torch.ones(1)}))


def harmless():
    lists = collections.defaultdict(list)
    lists["a"].append(1)
    return {
        "float64": (np.float64(2e-4), 2e-4), "int64": (np.int64(224), 224), "bool": (np.bool_(True), True),
        "float32": (np.float32(1.5), 1.5), "str": (np.str_("f30k"), "f30k"), "big": (np.dtype(">f4").type(0.5), 0.5),
        "array": (np.arange(6, dtype=np.float32).reshape(2, 3), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
        "dtype": (np.dtype("float32"), "f4"), "path": (pathlib.PosixPath("/data/f30k"), "/data/f30k"),
        "pure": (pathlib.PurePosixPath("runs/a"), "runs/a"), "windows": (pathlib.PureWindowsPath("C:\\a"), "C:\\a"),
        "lists": (lists, {"a": [1]}), "counts": (collections.defaultdict(int, x=2), {"x": 2}),
        "ordered": (collections.OrderedDict(a=1), {"a": 1}), "counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
        "set": ({1, 2}, [1, 2]), "frozenset": (frozenset([3]), [3]), "namespace": (argparse.Namespace(x=1), {"x": 1}),
        "simple": (types.SimpleNamespace(y=2), {"y": 2}), "tuple": ((1, 2), [1, 2]), "range": (range(3), [0, 3, 1]),
        "torch": (torch.float16, "float16"), "device": (torch.device("cuda:0"), "cuda:0"), "bytes": (b"xy", "xy"),
        "size": (torch.Size([1, 2]), [1, 2]),
    }  # fmt: skip


@pytest.mark.parametrize("name", harmless())
def test_harmless_values_among_the_options_are_read(tmp_path, name):
    value, expected = harmless()[name]
    found = read_checkpoint(save(tmp_path / "a.pth", given=value, inner={"deep": [value]})).opt
    assert found == {"given": expected, "inner": {"deep": [expected]}}
    assert type(found["given"]) is type(expected)


def test_dictionaries_with_attributes_are_read_without_their_package(tmp_path, monkeypatch):
    module = types.ModuleType("easydict")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})
    monkeypatch.setitem(sys.modules, "easydict", module)
    path = save(tmp_path / "a.pth", data=module.EasyDict(name="f30k", depth=2))
    monkeypatch.delitem(sys.modules, "easydict")
    assert read_checkpoint(path).opt == {"data": {"name": "f30k", "depth": 2}}


@pytest.mark.parametrize("where", ["opt", "rest", "model"])
@pytest.mark.parametrize(
    "call",
    [
        (open, "{mark}", "w"),
        (eval, "open({mark!r}, 'w')"),
        (subprocess.Popen, ["touch", "{mark}"]),
        (pathlib.Path.touch, pathlib.PurePosixPath("{mark}")),
        (np.load, "{mark}"),
        (torch.hub.load, "{mark}", "x"),
        (torch.load, "{mark}"),
    ],
)
def test_what_would_run_is_refused(tmp_path, call, where):
    mark = str(tmp_path / "ran")
    arguments = [item.format(mark=mark) if isinstance(item, str) else item for item in call[1:]]
    content = {"model": dict(SIDES), "opt": {}, where: Calls(call[0], *arguments)}
    if where == "model":
        content["model"] = {**SIDES, "x": Calls(call[0], *arguments)}
    torch.save(content, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: (refused|broken)") as told:
        read_checkpoint(tmp_path / "evil.pth")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()


def test_default_dictionaries_keep_no_function_that_makes_values(tmp_path):
    found = read_checkpoint(save(tmp_path / "a.pth", counts=collections.defaultdict(int))).opt["counts"]
    assert type(found) is dict
    with pytest.raises(ValueError, match=r"refused.*it asks for (posix|nt)"):
        read_checkpoint(save(tmp_path / "b.pth", counts=collections.defaultdict(os.getcwd)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_compressed_checkpoint_is_refused_before_it_is_read(tmp_path, compression):
    whole, bomb = save(tmp_path / "a.pth", {**SIDES, "txt_enc.x": torch.zeros(2**22)}), tmp_path / "bomb.pth"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bomb, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"bomb\.pth: refused: its parts are compressed or overlap"):
        read_checkpoint(bomb)


def test_a_large_pickle_is_refused(tmp_path):
    save(tmp_path / "a.pth", text="x" * 2**25)
    with pytest.raises(ValueError, match=r"a\.pth: refused: its pickle has .* bytes"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "call", [(bytearray, 10**11), (torch.Tensor, 10**6, 10**5), (list, range(10**11)), (bytes, 10**11)]
)
def test_values_that_take_any_memory_are_not_made(tmp_path, call):
    path = save(tmp_path / "a.pth", given=Calls(*call))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ValueError):  # it is refused, or left out
        assert read_checkpoint(path).opt["given"] in (None, "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_tensors_and_options_that_only_look_large_are_refused(tmp_path):
    blown = torch.ones(1).expand(10**6, 10**5)
    with pytest.raises(ValueError, match=r"img_enc\.fc\.weight repeats its stored numbers; expected 100,000,000,000"):
        read_checkpoint(save(tmp_path / "a.pth", {**SIDES, "img_enc.fc.weight": blown}))
    doubled = ["x"]
    for _ in range(15):
        doubled = [doubled, doubled, doubled]  # as many as 3^15 where each is looked at
    deep = []
    for _ in range(200):
        deep = [deep]
    endless = []
    endless.append(endless)
    for value in (doubled, deep, endless):
        with pytest.raises(ValueError, match="the options are nested too deep, or there are too many"):
            read_checkpoint(save(tmp_path / "a.pth", given=value))


def test_a_numpy_array_that_only_claims_a_size_is_refused(tmp_path):
    class Array:
        def __reduce__(self):
            state = (1, (10**9, 10**3), np.dtype("float32"), False, b"\0" * 8)
            return np.zeros(0).__reduce__()[0], (np.ndarray, (10**12,), b"b"), state

    with pytest.raises(ValueError, match="size differs from its data"):
        read_checkpoint(save(tmp_path / "a.pth", given=Array()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    path = save(tmp_path / "a.pth", {**SIDES, "txt_enc.fc.weight": torch.tensor([1.0, value])})
    with pytest.raises(ValueError, match=r"a\.pth: txt_enc\.fc\.weight holds a NaN or an infinity"):
        read_checkpoint(path)


def test_an_old_pickle_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": SIDES, "opt": Calls(open, str(tmp_path / "ran"), "w")}))
    with pytest.raises(ValueError, match=r"a\.pth: refused, nothing in it was run"):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
