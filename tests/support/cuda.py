"""A simulated GPU: tensors that say they are on `cuda:0`, hold their values on the CPU, and count.

As on a GPU, an operation of tensors on both devices is an error, and `numpy` is refused. Each wait of the host for the
device is counted with the line of the package that causes it. Everything within `simulated_cuda` sees the simulation;
nothing sees it afterwards.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
# Operations whose sizes depend on values, which the host must know.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
PACKING = {"_pack_padded_sequence", "_pack_padded_sequence_backward"}  # their lengths are on the CPU
# Operations without a kernel.
VIEWS = set(
    "view _unsafe_view detach alias expand transpose t permute unsqueeze squeeze select slice split split_with_sizes "
    "unbind as_strided _reshape_alias diagonal lift_fresh unfold empty empty_like new_empty empty_strided "
    "_local_scalar_dense set_ size stride".split()
)


class Simulation(TorchDispatchMode):
    """The counts of a simulated GPU.

    Attributes:
        waits: Waits of the host for the device, by kind and line of the package.
        kernels: Operations on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.waits: Counter[tuple[str, str]] = Counter()
        self.kernels = 0

    def wait(self, kind: str) -> None:
        """Count a wait."""
        self.waits[kind, _where()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on the CPU values of its tensors, as a GPU would allow it."""
        name = func.__name__.split(".")[0]
        if name == "_has_compatible_shallow_copy_type":
            return True
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        ours = [one for one in tensors if isinstance(one, CudaTensor)]
        device = kwargs.get("device")
        # "meta" is the device that C++ sees.
        target = None if device is None else "cuda" if torch.device(device).type in ("cuda", "meta") else "cpu"
        if name == "_to_copy":
            return self._copy(func, args[0], kwargs, target or ("cuda" if ours else "cpu"))
        if name == "copy_":
            return self._copy_into(func, args)
        if ours and len(ours) < len(tensors):
            self._mixed(name, args, [one for one in tensors if not isinstance(one, CudaTensor)])
        if name in WAITING or (name == "repeat_interleave" and len(args) == 1 and kwargs.get("output_size") is None):
            self.wait(name)
        if name in INDEXING and any(isinstance(i, CudaTensor) and i.dtype == torch.bool for i in args[1]):
            self.wait("index by bool")
        out = func(*tree_map(_value, args), **tree_map(_value, kwargs))
        if not ours and target != "cuda":
            return out
        if name == "_local_scalar_dense":
            return out
        self.kernels += name not in VIEWS
        if name == "_pack_padded_sequence":
            return CudaTensor(out[0]), out[1]
        known = {id(one.value): one for one in ours} if name.endswith("_") else {}
        return tree_map(lambda one: known.get(id(one)) or CudaTensor(one) if isinstance(one, Tensor) else one, out)

    def _copy(self, func: Any, source: Tensor, kwargs: dict[str, Any], to: str) -> Tensor:
        options = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        out = func(_value(source), **options, device=torch.device("cpu"))
        here = isinstance(source, CudaTensor)
        if here and to == "cpu":
            self.wait("copy to the host")
        elif not here and to == "cuda" and not kwargs.get("non_blocking"):
            self.wait("copy to the device")
        self.kernels += here and to == "cuda"
        return CudaTensor(out) if to == "cuda" else out

    def _copy_into(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        target, source, *rest = args
        if isinstance(target, CudaTensor) != isinstance(source, CudaTensor):
            self.wait("copy across")
        func(_value(target), _value(source), *rest)
        self.kernels += isinstance(target, CudaTensor)
        return target

    def _mixed(self, name: str, args: tuple[Any, ...], outside: list[Tensor]) -> None:
        """Refuse tensors of the CPU among ours, but for those that CUDA takes."""
        for one in outside:
            if name in PACKING or (
                not one.ndim and name not in ("index_select", "gather", "cat", "stack", "mm", "bmm")
            ):
                continue
            if name in INDEXING and one is not args[0] and not (len(args) > 2 and one is args[2]):
                self.wait("index by a CPU tensor")
                continue
            raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU, {tuple(one.shape)}, at {_where()}")


class CudaTensor(Tensor):
    """A tensor of the simulated GPU; `value` holds its numbers."""

    simulation: Simulation | None = None
    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, requires_grad: bool = False) -> CudaTensor:
        """Wrap a tensor of the CPU."""
        made = Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            layout=value.layout, device="meta", requires_grad=requires_grad,
        )  # fmt: skip
        made.value = value
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as CUDA does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        """Wait for the values."""
        if self.simulation:
            self.simulation.wait("tolist")
        return self.value.tolist()

    def data_ptr(self) -> int:
        """Return the address of the values."""
        return self.value.data_ptr()

    def __repr__(self) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> CudaTensor:
        made = CudaTensor(self.value.clone(), self.requires_grad)
        if getattr(self, "_is_param", False):
            made._is_param = True
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert cls.simulation is not None, "outside of the simulation"
        return cls.simulation.run(func, args, kwargs or {})


class _Gru(torch.autograd.Function):
    """cuDNN's GRU, whose backward pass needs train mode."""

    @staticmethod
    def forward(
        ctx: Any, compute: Any, sizes: Tensor, flags: Any, data: Tensor, start: Tensor, *weights: Tensor
    ) -> Any:
        with torch.enable_grad():
            leaves = [one.value.detach().requires_grad_() for one in (data, start, *weights)]
            outputs = compute(leaves[0], sizes, leaves[1], leaves[2:], *flags)
        ctx.leaves, ctx.outputs, ctx.training = leaves, outputs, flags[-2]
        CudaTensor.simulation.kernels += 1
        return tuple(CudaTensor(one.detach()) for one in outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        if not ctx.training:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        found = torch.autograd.grad(
            ctx.outputs, ctx.leaves, [None if one is None else one.value for one in upstream], allow_unused=True
        )
        CudaTensor.simulation.kernels += 1
        return None, None, None, *(None if one is None else CudaTensor(one) for one in found)


class _NoGrad(torch.no_grad):
    """In place of `inference_mode`, in which wrapped tensors cannot live."""

    def __init__(self, mode: bool = True) -> None:
        super().__init__()


@contextmanager
def simulated_cuda() -> Iterator[Simulation]:
    """Simulate a GPU within the block, in this thread."""
    make, make_as, gru = torch.tensor, torch.as_tensor, torch._VF.gru

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if device is not None and torch.device(device).type == "cuda":
            return make(data, **options).to(CUDA)
        return make(data, device=device, **options)

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        if not isinstance(data, CudaTensor) and (device is None or torch.device(device).type != "cuda"):
            return make_as(data, dtype=dtype, device=device)
        given = data if isinstance(data, CudaTensor) else make_as(data)
        return given.to(dtype=dtype or given.dtype, device=device or given.device)

    def compute(data: Any, sizes: Any, start: Any, weights: Any, *flags: Any) -> Any:
        if not isinstance(data, CudaTensor):
            return gru(data, sizes, start, weights, *flags)
        assert all(isinstance(one, CudaTensor) for one in weights), "weights of the GRU on the CPU"
        return _Gru.apply(gru, sizes, flags, data, start, *weights)

    with pytest.MonkeyPatch.context() as patch, Simulation() as simulation:
        patch.setattr(CudaTensor, "simulation", simulation)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch, "as_tensor", as_tensor)
        patch.setattr(torch, "inference_mode", _NoGrad)
        patch.setattr(torch._VF, "gru", compute)
        yield simulation


def move(module: nn.Module) -> None:
    """Move the parameters and buffers of a module to the simulated GPU; shared ones stay shared."""
    moved: dict[int, CudaTensor] = {}

    def to_device(tensor: Tensor) -> CudaTensor:
        made = moved.setdefault(id(tensor), CudaTensor(tensor.detach().clone(), tensor.requires_grad))
        if isinstance(tensor, nn.Parameter):
            made._is_param = True
        return made

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and not isinstance(tensor, CudaTensor):
                    held[name] = to_device(tensor)
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
            part._flat_weight_refs = [None for _ in part._flat_weights]


def _value(one: Any) -> Any:
    if isinstance(one, CudaTensor):
        return one.value
    return torch.device("cpu") if isinstance(one, torch.device) and one.type in ("cuda", "meta") else one


def _where() -> str:
    """Return the innermost line of the package, or else of transformers, that is running."""
    frames = list(reversed(traceback.extract_stack()))
    for room in ("/d2svse/", "/transformers/"):
        for frame in frames:
            if room in frame.filename and "/tests/" not in frame.filename:
                return f"{frame.filename.rsplit(room, 1)[-1]}:{frame.lineno}"
    return "?"
