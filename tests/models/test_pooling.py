import numpy as np
import pytest
import torch

from d2svse.models.pooling import POOLINGS, GeneralizedPooling, build_pooling, sinusoidal_positions, sort_descending


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def naive_gru(inputs, weights, suffix=""):
    w_ih, w_hh, b_ih, b_hh = (
        weights[f"gru.{name}_l0{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden, outputs = np.zeros(w_hh.shape[1]), []
    for x in inputs:
        i_r, i_z, i_n = np.split(w_ih @ x + b_ih, 3)
        h_r, h_z, h_n = np.split(w_hh @ hidden + b_hh, 3)
        reset, update = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
        hidden = (1 - update) * np.tanh(i_n + reset * h_n) + update * hidden
        outputs.append(hidden)
    return outputs


def naive_gpo(pooling, tokens, mask):
    """Row by row, dimension by dimension, in float64."""
    weights = {name: p.detach().double().numpy() for name, p in pooling.named_parameters()}
    result = np.zeros((len(tokens), tokens.shape[2]))
    for row, keep in enumerate(mask):
        real = tokens[row][keep].astype(np.float64)
        positions = np.zeros((len(real), pooling.position_dim))
        for place in range(len(real)):
            for k in range(0, pooling.position_dim, 2):
                frequency = 10000.0 ** (-k / pooling.position_dim)
                positions[place, k], positions[place, k + 1] = np.sin(place * frequency), np.cos(place * frequency)
        forwards = naive_gru(positions, weights)
        backwards = naive_gru(positions[::-1], weights, "_reverse")[::-1]
        logits = np.array(
            [weights["linear.weight"][0] @ ((f + b) / 2) for f, b in zip(forwards, backwards, strict=True)]
        )
        exponentials = np.exp(logits / 0.1 - (logits / 0.1).max())
        coefficients = exponentials / exponentials.sum()
        for d in range(tokens.shape[2]):
            result[row, d] = sum(c * v for c, v in zip(coefficients, sorted(real[:, d], reverse=True), strict=True))
    return result


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 7, 6, generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6, [0, 1, 1, 0, 1, 0, 0], [1] * 3 + [0] * 4]).bool()
    return tokens, mask


@pytest.fixture
def gpo():
    torch.manual_seed(3)
    return GeneralizedPooling(8, 5)


def test_gpo_equals_the_naive_loop(gpo, batch):
    tokens, mask = batch
    np.testing.assert_allclose(
        gpo(tokens, mask).detach().numpy(), naive_gpo(gpo, tokens.numpy(), mask.numpy()), atol=1e-5
    )
    whole = np.ones(mask.shape, dtype=bool)
    np.testing.assert_allclose(gpo(tokens).detach().numpy(), naive_gpo(gpo, tokens.numpy(), whole), atol=1e-5)


@pytest.mark.parametrize("name", POOLINGS)
def test_padding_and_batching_change_nothing(name, batch):
    torch.manual_seed(0)
    pooling, (tokens, mask) = build_pooling(name, 6), batch
    together = pooling(tokens, mask)
    for row in range(len(tokens)):
        alone = pooling(tokens[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-6, rtol=0)
    if name != "cls":
        garbage = torch.where(mask.unsqueeze(-1), tokens, torch.full_like(tokens, 1e4))
        torch.testing.assert_close(pooling(garbage, mask), together, atol=1e-6, rtol=0)
        longer = torch.nn.functional.pad(tokens, (0, 0, 0, 3), value=-7.0)
        padded = pooling(longer, torch.nn.functional.pad(mask, (0, 3), value=False))
        torch.testing.assert_close(padded, together, atol=1e-6, rtol=0)


def naive_esa(pooling, tokens, mask):
    """Row by row, dimension by dimension, in float64."""
    weight = pooling.linear.weight.detach().double().numpy()
    result = np.zeros((len(tokens), tokens.shape[2]))
    for row, keep in enumerate(mask):
        real = tokens[row][keep].astype(np.float64)
        for d in range(tokens.shape[2]):
            logits = np.array([weight[d] @ token for token in real])
            shares = np.exp(logits - logits.max())
            result[row, d] = sum(share * token[d] for share, token in zip(shares / shares.sum(), real, strict=True))
    return result


def test_esa_equals_the_naive_loop(batch):
    torch.manual_seed(3)
    pooling, (tokens, mask) = build_pooling("esa", 6), batch
    for given in (mask, None):
        expected = naive_esa(
            pooling, tokens.numpy(), np.ones(mask.shape, dtype=bool) if given is None else mask.numpy()
        )
        np.testing.assert_allclose(pooling(tokens, given).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["mean", "max"])
def test_simple_poolings_equal_numpy(name, batch):
    tokens, mask = batch
    expected = [
        getattr(np, name if name == "mean" else "max")(t[m], axis=0)
        for t, m in zip(tokens.numpy(), mask.numpy(), strict=True)
    ]
    np.testing.assert_allclose(POOLINGS[name]()(tokens, mask).numpy(), expected, rtol=1e-6)


def test_gpo_gradients_are_right():
    torch.manual_seed(1)
    pooling = GeneralizedPooling(4, 3)
    tokens = torch.randn(2, 4, 3, dtype=torch.float64)
    step, direction = 1e-3, torch.randn(2, 4, 3, dtype=torch.float64)
    leaf = tokens.clone().requires_grad_()
    pooling(leaf).sum().backward()
    difference = (pooling(tokens + step * direction).sum() - pooling(tokens - step * direction).sum()) / (2 * step)
    assert (leaf.grad * direction).sum().item() == pytest.approx(difference.item(), rel=1e-2)


def test_kept_coefficients_follow_the_weights(gpo, batch):
    """Fused optimizers change weights without raising the version that tensors carry."""
    tokens, mask = batch
    optimizer = torch.optim.AdamW(gpo.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        before = gpo(tokens, mask)
    gpo(tokens, mask).sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = gpo(tokens, mask)
    torch.testing.assert_close(after, gpo(tokens, mask).detach())
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.copy_(weight + 0.5),  # as weight averaging does; the version does not tell
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.detach().numpy().__iadd__(0.5),
    ],
)
def test_kept_coefficients_go_with_weights_that_change_without_a_trace(gpo, batch, change):
    gpo.eval()
    with torch.no_grad():
        before = gpo(*batch)
        for parameter in gpo.parameters():
            change(parameter)
        assert not torch.allclose(gpo(*batch), before)


def test_kept_coefficients_survive_the_modes_around_each_batch(gpo, batch):
    """As encoding sets them for every batch."""
    made = []
    gpo.gru.register_forward_pre_hook(lambda _, given: made.append(given))
    for _ in range(3):
        gpo.eval()
        with torch.inference_mode():
            gpo(*batch)
        gpo.train()
    assert len(made) == 1
    gpo.requires_grad_(False)
    tokens = batch[0].requires_grad_()
    gpo(tokens, batch[1]).sum().backward()  # the kept ones take part in a backward pass
    assert len(made) == 1
    assert tokens.grad.any()


def test_the_backward_pass_in_eval_mode_suits_cudnn(gpo, batch, monkeypatch):
    """cuDNN refuses the backward pass of a recurrent layer that ran in eval mode; torch passes it the mode."""
    modes, compute = [], torch._VF.gru

    def gru(*given):
        *_, training, _, _ = given  # bidirectional and batch_first come last
        modes.append(training)
        return compute(*given)

    monkeypatch.setattr(torch._VF, "gru", gru)
    trained = gpo.train()(*batch)
    gpo(*batch).sum().backward()
    evaluated = gpo.eval()(*batch)
    evaluated.sum().backward()
    assert modes == [True, True, True]
    assert torch.equal(trained, evaluated)
    assert gpo.gru.weight_hh_l0.grad.any()


def test_coefficients_are_made_once_for_a_length_in_inference(gpo, batch):
    asked = []
    gpo.gru.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape[:2]))
    tokens, mask = batch
    with torch.no_grad():
        gpo(tokens, mask)
        gpo(tokens, mask)
        gpo(tokens)
        gpo(tokens[:, :2])
    assert asked == [(3, 7), (1, 2)]  # lengths 1, 3 and 7, then 2; the longest of a call


@pytest.mark.parametrize("name", [name for name in POOLINGS if name != "cls"])
def test_a_row_without_tokens_is_an_error(name):
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="tokens are all masked"):
        build_pooling(name, 3)(torch.zeros(2, 2, 3), mask)


def test_stays_in_float32_inside_autocast(gpo, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inside = gpo(*batch)
    torch.testing.assert_close(inside, gpo(*batch).detach())


def test_sort_descending_equals_torch():
    values = torch.randn(3, 4, 50)
    torch.testing.assert_close(sort_descending(values), values.sort(-1, descending=True).values)


def test_positions_have_sine_in_even_and_cosine_in_odd_columns():
    positions = sinusoidal_positions(3, 4)
    torch.testing.assert_close(positions[2], torch.tensor([np.sin(2), np.cos(2), np.sin(0.02), np.cos(0.02)]).float())


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("masked", [True, False])
def test_no_rows_give_no_rows(name, masked):
    mask = torch.zeros(0, 3, dtype=torch.bool) if masked else None
    assert build_pooling(name, 6)(torch.zeros(0, 3, 6), mask).shape == (0, 6)
