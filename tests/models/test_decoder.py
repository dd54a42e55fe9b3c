import numpy as np
import pytest
import torch

from d2svse.models import ContextDecoder


def naive_layer_norm(x, module):
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + module.eps)
    return normal * module.weight.detach().double().numpy() + module.bias.detach().double().numpy()


def naive_linear(x, weight, bias):
    return x @ weight.detach().double().numpy().T + bias.detach().double().numpy()


def gelu(x):
    return np.vectorize(lambda v: 0.5 * v * (1 + torch.erf(torch.tensor(v / np.sqrt(2), dtype=torch.float64)).item()))(
        x
    )


def naive_decoder(decoder, words, num_before, placement_positions):
    """One sentence of real words only, `(length, dim)`, in float64."""
    tokens = decoder.tokens.detach().double().numpy()
    x = np.concatenate([tokens[:num_before], words, tokens[num_before:]])
    if placement_positions:
        x = x + decoder.position_embeddings.weight.detach().double().numpy()[: len(x)]
    for layer in decoder.layers.layers:
        attention = layer.self_attn
        queries, keys, values = np.split(
            naive_linear(naive_layer_norm(x, layer.norm1), attention.in_proj_weight, attention.in_proj_bias), 3, axis=-1
        )
        size, out = x.shape[1] // attention.num_heads, []
        for head in range(attention.num_heads):
            part = slice(head * size, (head + 1) * size)
            logits = queries[:, part] @ keys[:, part].T / np.sqrt(size)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ values[:, part])
        x = x + naive_linear(np.concatenate(out, -1), attention.out_proj.weight, attention.out_proj.bias)
        hidden = gelu(naive_linear(naive_layer_norm(x, layer.norm2), layer.linear1.weight, layer.linear1.bias))
        x = x + naive_linear(hidden, layer.linear2.weight, layer.linear2.bias)
    x = naive_layer_norm(x, decoder.layers.norm)
    if not len(tokens):
        return x.mean(0)
    return np.concatenate([x[:num_before], x[num_before + len(words) :]]).mean(0)


def make(placement="surround", num_tokens=3, **options):
    torch.manual_seed(0)
    decoder = ContextDecoder(8, num_tokens=num_tokens, num_layers=2, num_heads=2, placement=placement, **options).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.4)
    return decoder


WORDS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize(("placement", "num_before"), [("prefix", 3), ("postfix", 0), ("surround", 1)])
def test_equals_the_naive_loop_and_padding_is_masked(placement, num_before, positions):
    decoder = make(placement, positions=positions)
    expected = [
        naive_decoder(decoder, words[mask].double().numpy(), num_before, positions)
        for words, mask in zip(WORDS, MASK, strict=True)
    ]
    np.testing.assert_allclose(decoder(WORDS, MASK).detach().numpy(), expected, atol=1e-5)
    with torch.no_grad():  # the fused kernels of inference
        np.testing.assert_allclose(decoder(WORDS, MASK).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("positions", [True, False])
def test_without_tokens_the_outputs_at_the_words_are_averaged(positions):
    decoder = make(num_tokens=0, positions=positions)
    expected = [
        naive_decoder(decoder, words[mask].double().numpy(), 0, positions)
        for words, mask in zip(WORDS, MASK, strict=True)
    ]
    np.testing.assert_allclose(decoder(WORDS, MASK).detach().numpy(), expected, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(decoder(WORDS, MASK).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("placement", "num_tokens"), [("prefix", 3), ("postfix", 3), ("surround", 3), ("surround", 0)])
def test_padding_and_batching_change_nothing(placement, num_tokens):
    decoder = make(placement, num_tokens)
    together = decoder(WORDS, MASK)
    for row in range(len(WORDS)):
        torch.testing.assert_close(
            decoder(WORDS[row : row + 1], MASK[row : row + 1])[0], together[row], atol=1e-5, rtol=0
        )
    garbage = WORDS.masked_fill(~MASK.unsqueeze(-1), 99.0)
    torch.testing.assert_close(decoder(garbage, MASK), together, atol=1e-5, rtol=0)


def test_the_published_form_attends_to_padding():
    decoder = make("postfix", positions=False, mask_padding=False)
    garbage = WORDS.masked_fill(~MASK.unsqueeze(-1), 99.0)
    assert not torch.allclose(decoder(garbage, MASK)[1], decoder(WORDS, MASK)[1], atol=1e-3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="placement must be one of"):
        ContextDecoder(8, placement="around")
    with pytest.raises(ValueError, match="3 heads do not divide the width 8"):
        ContextDecoder(8, num_heads=3)
    with pytest.raises(ValueError, match=r"num_heads of the decoder must be at least 1 .*, got 0, 4, 100"):
        ContextDecoder(8, num_layers=0)
    with pytest.raises(ValueError, match="a text of 5 tokens is longer than the decoder's 3"):
        make(max_positions=6)(WORDS)
