"""A simulated CUDA device: tensors that report `cuda:0`, hold their values in memory, and are counted.

    with simulated_cuda() as seen:
        model.to("cuda")
        model(...)
    print(seen.kernels.total(), seen.waits)

Inside the block a tensor that is made on, or moved to, "cuda" is a `CudaTensor`. Operations refuse to mix it with
tensors of the CPU, as CUDA does. `Seen` counts kernels, the bytes that they read and write, and the lines of code at
which the host waits for the device. These are what `torch.cuda.set_sync_debug_mode` warns of: values that are read,
copies that are not `non_blocking`, and outputs whose shape depends on values. With `float64=False` the device refuses
that type, as Apple's MPS does.

Two things differ from a device. Kernels are those of the CPU, which fuses other operations, so their number is near
that of a device. Inference mode is no-grad mode, in which such tensors can live.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from d2svse.similarity import scaling, transport

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
PACKAGES = ("/d2svse/", "/transformers/", "/accelerate/", "/torch/optim/", "/tests/")

READS_A_VALUE = {"_local_scalar_dense", "equal", "is_nonzero"}
SHAPE_FOLLOWS_VALUES = {
    "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
JOINS = {"cat", "stack", "index_select", "gather", "bmm", "mm"}  # no scalar of the CPU goes into these
NO_KERNEL = {
    "view", "_unsafe_view", "detach", "detach_", "alias", "expand", "transpose", "t", "permute", "unsqueeze", "squeeze",
    "select", "slice", "split", "split_with_sizes", "unbind", "as_strided", "_reshape_alias", "diagonal", "lift_fresh",
    "unfold", "empty", "empty_like", "empty_strided", "new_empty", "is_same_size", "_local_scalar_dense", "set_",
    "narrow", "_has_compatible_shallow_copy_type",
}  # fmt: skip


@dataclass
class Seen:
    """Counts of what the device did.

    Attributes:
        kernels: number of kernels, by operation.
        bytes: bytes that kernels read and write, by operation.
        waits: how often the host waited for the device, by kind and line of code.
        sent: bytes from the host to the device.
        received: bytes from the device to the host.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: int = 0
    received: int = 0

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def __str__(self) -> str:
        moved = sum(self.bytes.values()) / 1e6
        lines = [f"{self.kernels.total()} kernels, {moved:.1f} MB read and written, {self.waits.total()} waits"]
        lines += [f"  {count:3d} {kind}: {line}" for (kind, line), count in self.waits.most_common()]
        return "\n".join(lines)


class CudaTensor(Tensor):
    """A tensor that reports `cuda:0` and holds its values in `inner`, a tensor of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> CudaTensor:
        made: CudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="meta",  # for C++, which knows no other device here; the properties below are for Python
            requires_grad=requires_grad,
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor, requires_grad: bool = False) -> None:
        pass

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy  # type: ignore[assignment]

    def tolist(self) -> Any:
        _note_wait("tolist")
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> CudaTensor:
        copy = CudaTensor(self.inner.clone(), self.requires_grad)
        if isinstance(self, nn.Parameter):
            copy._is_param = True
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    """Send every operation through `_run`, those that only make a tensor included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_seen: Seen | None = None
_has_float64 = True


@contextmanager
def simulated_cuda(float64: bool = True) -> Iterator[Seen]:
    """Simulate a CUDA device inside the block; yield the counts."""
    global _seen, _has_float64
    assert _seen is None, "there is one simulated device"
    earlier = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (Tensor, "to", _to(Tensor.to)),
            (threading.Thread, "run", _run_thread(threading.Thread.run)),
            (torch, "tensor", _made_on_device(torch.tensor)),
            (torch, "as_tensor", _made_on_device(torch.as_tensor)),
            (torch, "inference_mode", _no_grad),
            (torch._VF, "gru", _gru(torch._VF.gru)),  # type: ignore[attr-defined]
            (scaling, "fused_kernels", lambda tensor: None),  # they need a real device
            (transport, "fused_kernels", lambda tensor: None),
        ):
            stack.enter_context(patch.object(target, name, value))
        torch.__future__.set_swap_module_params_on_conversion(True)  # as on a device, parameters stay the same objects
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, earlier)
        _seen, _has_float64 = Seen(), float64
        try:
            with _Device():
                yield _seen
        finally:
            _seen, _has_float64 = None, True


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name: str = func.__name__.split(".")[0]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
    device = kwargs.get("device")
    # C++ takes "meta" from the options of a CudaTensor.
    makes_there = device is not None and torch.device(device).type in ("cuda", "meta")
    if name == "_to_copy":
        return _copy_to(func, args[0], kwargs, makes_there if device is not None else bool(there))
    if name == "copy_":
        return _copy_into(func, *args)
    if name == "_has_compatible_shallow_copy_type":
        return True
    if there:
        _check_devices(name, args, tensors)
        _note_waits(name, args, kwargs)
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not (there or makes_there) or name == "_local_scalar_dense":
        return result
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    _check_dtype(*outputs)
    if name not in NO_KERNEL:
        _count(name, tensors, outputs)
    same = {id(tensor.inner): tensor for tensor in there} if name.endswith("_") else {}
    return tree_map(lambda leaf: same.get(id(leaf), CudaTensor(leaf)) if isinstance(leaf, Tensor) else leaf, result)


def _copy_to(func: Any, source: Tensor, kwargs: dict[str, Any], to_cuda: bool) -> Tensor:
    from_cuda = isinstance(source, CudaTensor)
    options = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    copy: Tensor = func(_inner(source), **options, device=CPU)
    if to_cuda:
        _check_dtype(copy)
    if _seen is not None and from_cuda != to_cuda:
        if not kwargs.get("non_blocking"):
            _note_wait("copy to the host" if from_cuda else "copy to the device")
        if from_cuda:
            _seen.received += copy.nbytes
        else:
            _seen.sent += copy.nbytes
    elif from_cuda:
        _count("_to_copy", [source], [copy])
    return CudaTensor(copy) if to_cuda else copy


def _copy_into(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, CudaTensor) != isinstance(source, CudaTensor) and not non_blocking:
        _note_wait("copy_ between host and device")
    func(_inner(target), _inner(source))
    if isinstance(target, CudaTensor):
        _count("copy_", [source], [target])
    return target


def _check_dtype(*tensors: Tensor) -> None:
    if not _has_float64 and any(tensor.dtype == torch.float64 for tensor in tensors):
        raise TypeError(f"the device does not support float64 ({_line()})")


def _check_devices(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise for a tensor of the CPU beside those of the device, where CUDA does."""
    for tensor in tensors:
        if isinstance(tensor, CudaTensor):
            continue
        if tensor.ndim == 0 and name not in JOINS:  # a scalar
            continue
        is_index = name in INDEXING and any(tensor is index for index in args[1])
        if is_index and isinstance(args[0], CudaTensor):
            _note_wait("index of the CPU")
            continue
        shapes = [(type(one).__name__, tuple(one.shape)) for one in tensors]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name} of {shapes} at {_line()})"
        )


def _note_waits(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name in READS_A_VALUE | SHAPE_FOLLOWS_VALUES:
        _note_wait(name)
    elif name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) == 1:
        _note_wait(name)
    elif name in INDEXING:
        masks = [index for index in args[1] if isinstance(index, CudaTensor) and index.dtype == torch.bool]
        filled = name != "index" and len(args) > 2 and args[2].numel() == 1  # torch then calls masked_fill
        if masks and not filled:
            _note_wait("index by a mask")


def _count(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    if _seen is not None:
        _seen.kernels[name] += 1
        _seen.bytes[name] += sum(_inner(tensor).nbytes for tensor in (*inputs, *outputs))


def _note_wait(kind: str) -> None:
    if _seen is not None:
        _seen.waits[kind, _line()] += 1


def _line() -> str:
    """Return the innermost line of code of `PACKAGES`."""
    for frame in reversed(traceback.extract_stack()):
        for package in PACKAGES:
            if package in frame.filename and not frame.filename.endswith("/support/cuda.py"):
                return f"{package.strip('/')}/{frame.filename.rpartition(package)[2]}:{frame.lineno} {frame.line}"
    return "elsewhere"


def _inner(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.inner
    return CPU if isinstance(value, torch.device) and value.type in ("cuda", "meta") else value


def _made_on_device(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.tensor` or `torch.as_tensor` for the simulated device, where C++ would look for a real one."""

    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, CudaTensor):
            target: dict[str, Any] = {} if device is None else {"device": device}
            return data.to(**target, **kwargs)
        if device is None or torch.device(device).type != "cuda":
            return plain(data, *args, device=device, **kwargs)
        return plain(data, *args, **kwargs).to(CUDA)

    return make


def _to(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `Tensor.to` that takes "cuda" without a number, for which C++ would ask a real device."""

    def numbered(value: Any) -> Any:
        named = isinstance(value, str | torch.device) and torch.device(value).type == "cuda"
        return CUDA if named else value

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return plain(self, *map(numbered, args), **{name: numbered(value) for name, value in kwargs.items()})

    return to


def _run_thread(plain: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Return `Thread.run` inside the dispatch mode, which each thread has for itself."""

    def run(self: threading.Thread) -> None:
        with _Device():
            plain(self)

    return run


def _no_grad(mode: bool = True) -> AbstractContextManager[Any]:
    return torch.no_grad() if mode else nullcontext()


def _gru(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch's GRU for the simulated device: one kernel of cuDNN, whose backward pass is for train mode only."""

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, data: CudaTensor, start: CudaTensor, flags: Any, *weights: CudaTensor) -> Any:
            ctx.training = flags[3]  # after bias, number of layers and dropout
            with torch.enable_grad():
                ctx.inputs = [tensor.inner.detach().requires_grad_() for tensor in (data, start, *weights)]
                values, first, *own = ctx.inputs
                ctx.outputs = plain(values, first, own, *flags)
            _count("gru", [data, *weights], list(ctx.outputs))
            return tuple(CudaTensor(output.detach()) for output in ctx.outputs)

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            if not ctx.training:
                raise RuntimeError("cudnn RNN backward can only be called in training mode")
            found = torch.autograd.grad(ctx.outputs, ctx.inputs, [_inner(one) for one in upstream], allow_unused=True)
            _count("gru_backward", list(upstream), [one for one in found if one is not None])
            data, start, *weights = (None if one is None else CudaTensor(one) for one in found)
            return data, start, None, *weights

    def call(data: Tensor, start: Tensor, weights: Any, *flags: Any) -> Any:
        if not isinstance(data, CudaTensor):
            return plain(data, start, weights, *flags)
        assert isinstance(weights, list), "no code of the package packs sequences"
        assert all(isinstance(weight, CudaTensor) for weight in (start, *weights)), "the weights are on another device"
        return Whole.apply(data, start, flags, *weights)

    return call
