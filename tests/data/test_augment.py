import numpy as np
from PIL import Image

from d2svse.data import augment


def draws(count, purpose=0):
    return (augment.generator(0, 0, index, purpose) for index in range(count))


def test_a_generator_is_a_pure_function_of_its_four_numbers():
    numbers = [(s, e, i, p) for s in range(2) for e in range(2) for i in range(2) for p in range(2)]
    values = {key: augment.generator(*key).random() for key in numbers}
    assert len(set(values.values())) == len(numbers)
    assert all(augment.generator(*key).random() == value for key, value in values.items())


def test_crops_have_both_sides_of_one_share_between_six_tenths_and_one():
    picture = Image.new("RGB", (200, 100))
    sizes = np.array([augment.augment_image(picture, rng).size for rng in draws(300)])
    shares = sizes / (200, 100)
    assert shares.min() >= 0.6 - 0.005
    assert shares.max() <= 1
    np.testing.assert_allclose(shares[:, 0], shares[:, 1], atol=0.008)
    assert abs(shares[:, 0].mean() - 0.8) < 0.02


def test_half_of_the_pictures_are_mirrored_and_one_pixel_survives():
    pixels = np.zeros((50, 50, 3), np.uint8)
    pixels[:, :, 0] = np.arange(50) * 5
    crops = [np.asarray(augment.augment_image(Image.fromarray(pixels), rng))[0, :, 0] for rng in draws(300)]
    mirrored = np.mean([crop[0] > crop[-1] for crop in crops])
    assert abs(mirrored - 0.5) < 0.1
    assert augment.augment_image(Image.new("RGB", (1, 1)), next(draws(1))).size == (1, 1)


IDS = [101, 11, 12, 21, 31, 32, 33, 41, 102]
WORDS = [None, 0, 0, 1, 2, 2, 2, 3, None]


def test_words_are_touched_whole_and_at_the_published_rates():
    fates = {"kept": 0, "masked": 0, "dropped": 0, "replaced": 0}
    for rng in draws(4000):
        out = augment.augment_words(IDS, WORDS, rng, 103, np.array([900, 901]))
        assert out[0] == 101
        assert out[-1] == 102
        assert len(out) > 2
        if len(out) == len(IDS):
            for word in range(4):
                pieces = {
                    (original, out[i]) for i, (original, w) in enumerate(zip(IDS, WORDS, strict=True)) if w == word
                }
                kinds = {
                    "kept" if new == old else "masked" if new == 103 else "replaced" if new >= 900 else "?"
                    for old, new in pieces
                }
                assert len(kinds) == 1
                fates[kinds.pop()] += 1
        for word, pieces in enumerate(((11, 12), (21,), (31, 32, 33), (41,))):
            assert sum(piece in out for piece in pieces) in (0, len(pieces)), word
        fates["dropped"] += len(IDS) - len(out) if len(out) < len(IDS) else 0
    alone = [
        augment.augment_words([101, 5, 6, 102], [None, 0, 1, None], rng, 103, np.array([900])) for rng in draws(20000)
    ]
    first = [out[1] if len(out) == 4 else None for out in alone]
    rates = {token: np.mean([token == f for f in first]) for token in (103, 900)}
    assert abs(rates[103] / rates[900] - 5) < 1
    dropped = np.mean([len(out) < 4 for out in alone])
    assert abs(dropped - 2 * 0.2 * 0.4) < 0.02


def test_without_a_mask_token_words_are_dropped_and_one_always_stays():
    for rng in draws(2000):
        out = augment.augment_words([1, 7, 8, 2], [None, 0, 1, None], rng, None, np.array([9]))
        assert len(out) >= 3
    assert augment.augment_words([1, 2], [None, None], next(draws(1)), None, np.array([9])) == [1, 2]


def test_image_tokens_are_dropped_at_the_published_rate():
    kept = np.array([augment.keep_image_tokens(197, rng).mean() for rng in draws(4000)])
    whole = (kept == 1).mean()
    assert abs(whole - 0.2) < 0.03
    expected = 1 - 0.2 * (1 - 0.2**2) / 2  # the mean of 1 - 0.2 u over u > 0.2
    assert abs(kept.mean() - expected) < 0.005
    assert all(augment.keep_image_tokens(1, rng).all() for rng in draws(50))
