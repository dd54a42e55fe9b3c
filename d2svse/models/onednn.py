"""Linear layers by oneDNN, in inference, on CPUs on which it is faster than what PyTorch takes.

PyTorch has no public switch for it. On an AMD CPU it makes an evaluation 1.4 times as fast (docs/benchmarks.md). Two
public ways gave less on an Intel CPU: `torch.compile` made a ViT-Tiny 1.15 times as fast, and bfloat16 with AVX512-BF16
(which AMD's CPUs also have) made encoding slower.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU_INFO = Path("/proc/cpuinfo")


def faster_linear(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which linear layers without gradient take the faster library, if there is one for the device.

    Scores change in the last digits of float32 only. It heeds `torch.backends.mkldnn.enabled`.
    """
    if device.type == "cpu" and torch.backends.mkldnn.enabled and has_slow_blas():
        return OneDNNLinear()
    return nullcontext()


@cache
def has_slow_blas() -> bool:
    """Whether PyTorch multiplies by MKL on an AMD CPU with AVX-512, where oneDNN is faster (docs/benchmarks.md)."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if platform.machine() != "x86_64" or not CPU_INFO.is_file() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in CPU_INFO.read_text()


class OneDNNLinear(TorchFunctionMode):
    """Call oneDNN instead of `torch.nn.functional.linear` for float32 tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """As every mode of `torch.overrides`."""
        if func is F.linear and not kwargs and not torch.is_grad_enabled():
            inputs, weight, bias = (*args, None)[:3]
            if inputs.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
                result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
                return result
        return func(*args, **(kwargs or {}))
