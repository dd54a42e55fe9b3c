"""The kernels for GPUs, run by Triton's interpreter on the CPU, against the scaling in torch."""

import os
import subprocess
import sys

import pytest
import torch

from d2svse.features import Features
from d2svse.similarity import scaling
from d2svse.similarity.base import build_similarity

pytest.importorskip("triton", reason="the kernels for GPUs need triton")

if os.environ.get("TRITON_INTERPRET") != "1":  # triton reads it once, when it is imported

    def test_the_kernels_by_the_interpreter():
        line = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--noconftest", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(line, capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stdout[-3000:]

else:
    from d2svse.similarity import fused

    @pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 37, 2, 19), (2, 600, 1, 20), (1, 1, 1, 1)])
    @pytest.mark.parametrize("bins", [True, False])
    def test_scores_and_gradients_are_those_of_the_scaling(shape, bins):
        images, patches, texts, words = shape
        torch.manual_seed(0)
        products = torch.rand(shape) * 1.6 - 0.8
        marginals = [torch.rand(images, texts, count) for count in (patches, words)]
        for weights in marginals:
            weights[..., 1:].masked_fill_(torch.rand_like(weights[..., 1:]) < 0.2, 0)
        scoring = [torch.arange(count) > 0 if bins else None for count in (patches, words)]
        found = []
        for function in (scaling._Scaling, fused.FusedScaling):
            leaves = [part.clone().requires_grad_() for part in (products, *marginals)]
            scores, exact = function.apply(*leaves, 0.05, 3, *scoring)
            assert exact
            (scores * torch.linspace(0.5, 1.5, scores.numel()).view_as(scores)).sum().backward()
            found.append([scores.detach(), *(leaf.grad for leaf in leaves)])
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("value", [100.0, torch.nan])
    def test_products_of_parts_without_weight_count_nothing(value):
        torch.manual_seed(0)
        products, weights = torch.rand(1, 4, 1, 3), [torch.ones(1, 1, 4) / 4, torch.ones(1, 1, 3) / 3]
        weights[0][..., 2], weights[1][..., 1] = 0, 0
        found = []
        for inner in (0.5, value):
            products[:, 2], products[..., 1] = inner, inner
            leaves = [part.clone().requires_grad_() for part in (products, *weights)]
            scores, exact = fused.FusedScaling.apply(*leaves, 0.05, 3, None, None)
            assert exact
            scores.sum().backward()
            found.append([scores.detach(), *(leaf.grad for leaf in leaves)])
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)

    def test_a_kernel_that_leaves_the_range_is_told():
        products = torch.tensor([[[[-1.0, 1.0]]]])
        weights = torch.ones(1, 1, 1), torch.ones(1, 1, 2)
        for regularization, fits in ((0.05, True), (0.01, False)):
            _, exact = fused.FusedScaling.apply(products, *weights, regularization, 3, None, None)
            assert bool(exact) == fits

    def test_omit_is_the_same_by_the_kernels(monkeypatch):
        torch.manual_seed(0)
        sides = [
            Features(
                torch.randn(n, 8), torch.randn(n, length, 8), torch.arange(length) < torch.tensor(lengths)[:, None]
            )
            for n, length, lengths in ((3, 6, [6, 2, 4]), (4, 5, [1, 5, 3, 5]))
        ]
        omit = build_similarity("omit", 8)
        expected = omit(*sides)
        monkeypatch.setattr(scaling, "fused_kernels", lambda tensor: fused)
        torch.testing.assert_close(omit(*sides), expected, rtol=1e-5, atol=1e-6)
