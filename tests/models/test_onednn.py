import pytest
import torch
import torch.nn.functional as F

from d2svse.models import onednn

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of PyTorch is without oneDNN's linear layers"
)


def count_calls(monkeypatch):
    calls = []

    class Counted(onednn.OneDNNLinear):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = super().__torch_function__(func, types, args, kwargs)
            if func is F.linear:
                calls.append(args[1].shape)
            return result

    monkeypatch.setattr(onednn, "OneDNNLinear", Counted)
    return calls


def test_embeddings_are_the_same_to_rounding(model, val_dataset, monkeypatch):
    calls = count_calls(monkeypatch)
    found = []
    for slow in (False, True):
        monkeypatch.setattr(onednn, "has_slow_blas", lambda slow=slow: slow)
        found.append((model.encode_image(val_dataset.images[:5]), model.encode_text(val_dataset.captions[:7])))
        assert bool(calls) == slow
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(torch.from_numpy(plain), torch.from_numpy(fast), rtol=0, atol=1e-6)


def test_it_is_left_out_where_it_does_not_belong(monkeypatch):
    monkeypatch.setattr(onednn, "has_slow_blas", lambda: True)
    cpu = torch.device("cpu")
    assert not isinstance(onednn.faster_linear(torch.device("meta")), onednn.OneDNNLinear)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not isinstance(onednn.faster_linear(cpu), onednn.OneDNNLinear)
    inputs, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    with onednn.faster_linear(cpu):
        F.linear(inputs, weight).sum().backward()
        with torch.no_grad():
            assert F.linear(inputs.double(), weight.double()).dtype == torch.float64
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert F.linear(inputs, weight).dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad, inputs.sum(0).expand(5, 4))
