from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertConfig,
    Blip2Config,
    Florence2Config,
    VisionEncoderDecoderConfig,
    ViTConfig,
)

from d2svse.captioning.images import Sampling, images_to_caption, take_part
from d2svse.captioning.llava import PLAIN_TEMPLATE, LlavaCaptioner, SeededSampling
from d2svse.images import load_image
from support.images import write_images
from support.llava import save_tiny_llava

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DRAWN = Sampling(temperature=1.0, max_new_tokens=12)


def load(folder, sampling=DRAWN, **options):
    return LlavaCaptioner.from_pretrained(str(folder), sampling, **{"dtype": "float32", "device": "cpu", **options})


def captions(captioner, images):
    outcomes = []
    captioner.run(images, outcomes.append)
    return {outcome.image.name: outcome for outcome in outcomes}


def texts(captioner, images):
    return {name: (outcome.text, outcome.seed) for name, outcome in captions(captioner, images).items()}


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("chat", [True, False])
def test_captions_depend_on_seed_and_image_and_not_on_batch_order_or_part(photos, tmp_path, family, chat):
    folder = save_tiny_llava(tmp_path / "model", chat=chat, family=family)
    images = images_to_caption(photos)
    alone = texts(load(folder, batch_size=1), images)
    assert len(alone) == 6
    assert len({text for text, _ in alone.values()}) == 6
    together = load(folder, batch_size=4)
    assert texts(together, images) == alone
    assert texts(together, images[::-1]) == alone
    in_parts = {}
    for part in ("1/3", "2/3", "3/3"):
        in_parts |= texts(together, take_part(images, part))
    assert in_parts == alone
    other = texts(load(folder, replace(DRAWN, seed=1)), images)
    assert all(other[name] != alone[name] for name in alone)


def test_what_is_drawn_depends_on_what_the_file_holds_and_not_on_its_name(llava, photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "moved.png").write_bytes((photos / "003.png").read_bytes())
    moved = texts(load(llava), images_to_caption(tmp_path / "elsewhere"))["moved.png"]
    assert moved == texts(load(llava), images_to_caption(photos))["003.png"]


@pytest.mark.parametrize("chat", [True, False])
def test_at_temperature_0_the_text_is_that_of_transformers_greedy_decoding(photos, tmp_path, chat):
    folder = save_tiny_llava(tmp_path / "model", chat=chat)
    prompt = "the red dog"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    captioner = load(folder, Sampling(prompt=prompt, temperature=0, max_new_tokens=9))
    for image in images_to_caption(photos):
        image = load_image(image.path)
        if chat:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            text = PLAIN_TEMPLATE.format(image="<image>", prompt=prompt)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert captioner.generate([image], [0])[0][0] == expected


def naive_draw(scores, uniform, temperature, top_p):
    """The token at which the cumulative probability of the nucleus passes a uniform number, by loops."""
    weights = [float(np.exp((score - max(scores)) / temperature)) for score in scores]
    probabilities = [weight / sum(weights) for weight in weights]
    kept, total = set(), 0.0
    for token in sorted(range(len(scores)), key=lambda token: -probabilities[token]):
        kept.add(token)
        total += probabilities[token]
        if total >= top_p:
            break
    reached = 0.0
    for token in range(len(scores)):
        if token in kept:
            reached += probabilities[token] / total
            if reached > uniform:
                return token
    raise AssertionError("no token")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.2, 0.9), (2.0, 0.5), (0.7, 1e-6)])
def test_tokens_are_drawn_as_a_naive_loop_draws_them(temperature, top_p):
    random = np.random.default_rng(0)
    seeds, steps, prompt = list(range(40)), 5, 7
    sampling = SeededSampling(seeds, temperature, top_p, prompt, steps)
    for step in range(steps):
        scores = random.normal(size=(len(seeds), 30)).astype(np.float32)
        left = sampling(torch.zeros(len(seeds), prompt + step, dtype=torch.long), torch.from_numpy(scores))
        assert ((left == 0).sum(dim=1) == 1).all()
        assert (left.max(dim=1).values == 0).all()
        for row, seed in enumerate(seeds):
            uniform = np.random.default_rng(seed).random(steps)[step]
            assert left[row].argmax() == naive_draw(scores[row].tolist(), uniform, temperature, top_p)


def test_tokens_come_as_often_as_their_probability_says():
    count = 4000
    scores = torch.log(torch.tensor([0.5, 0.2, 0.04, 0.0, 0.26])).expand(count, 5)
    left = SeededSampling(range(count), 1.0, 0.95, 3, 1)(torch.zeros(count, 3, dtype=torch.long), scores)
    shares = np.bincount(left.argmax(dim=1).numpy(), minlength=5) / count
    assert shares == pytest.approx([0.5 / 0.96, 0.2 / 0.96, 0, 0, 0.26 / 0.96], abs=0.025)


class Scripted(LlavaCaptioner):
    """Says what is written for an image's draws, in place of the model."""

    def __init__(self, said, tries=3, temperature=1.0, batch_size=2):
        self.said, self.tries, self.batch_size = said, tries, batch_size
        self.sampling = Sampling(temperature=temperature)
        self.asked = []

    def generate(self, images, seeds):
        self.asked.append(len(images))
        drawn = {
            self.sampling.image_seed(path.read_bytes(), draw): (path, draw) for path in self.said for draw in range(9)
        }
        return [(self.said[path][draw], "stop") for path, draw in (drawn[seed] for seed in seeds)]


def test_an_empty_or_repeating_text_is_drawn_anew_and_fails_in_the_end(photos):
    images = images_to_caption(photos)[:3]
    said = {image.path: ["fine"] * 9 for image in images}
    said[images[0].path] = ["", "a dog, " * 9, "a dog"] + ["not asked for"] * 6
    said[images[2].path] = [""] * 4 + ["at last"] * 5
    captioner = Scripted(said)
    outcomes = captions(captioner, images)
    assert [(outcomes[p.name].text, outcomes[p.name].draw) for p in images] == [("a dog", 2), ("fine", 0), (None, 3)]
    assert outcomes["002.png"].reason == "an empty caption"
    again = captions(captioner, [replace(images[2], draw=3)])["002.png"]  # what a second run asks for
    assert (again.text, again.draw) == ("at last", 4)
    assert sum(captioner.asked) == 3 + 1 + 3 + 2


def test_at_temperature_0_nothing_is_drawn_twice(llava):
    assert load(llava, Sampling(temperature=0)).tries == 1
    assert load(llava).tries == 3


def test_an_image_that_breaks_later_is_an_outcome_and_the_rest_go_on(llava, photos):
    images = images_to_caption(photos)
    (photos / "001.png").write_bytes(b"no")
    outcomes = captions(load(llava, batch_size=2), images)
    assert "001.png: not an image" in outcomes["001.png"].reason
    assert sum(outcome.text is not None for outcome in outcomes.values()) == 5


def test_a_caption_says_whether_it_was_cut(llava, tmp_path):
    images = images_to_caption(write_images(tmp_path / "many", 30))
    short = captions(load(llava, batch_size=30), images)
    longer = captions(load(llava, replace(DRAWN, max_new_tokens=60), batch_size=30), images)
    compared = {name for name in short if short[name].draw == longer[name].draw == 0}
    assert {short[name].finish for name in compared} == {"stop", "length"}
    for name in compared:
        if short[name].finish == "stop":
            assert longer[name].text == short[name].text
        else:
            assert longer[name].text.startswith(short[name].text)
            assert len(longer[name].text) > len(short[name].text)


def test_settings_tell_what_captions_depend_on(llava):
    settings = load(llava, dtype="bfloat16", batch_size=3).settings
    assert settings == {
        "made_by": "transformers", "model": str(llava), "commit": None, "dtype": "bfloat16",
        "prompt": "Describe this image in detail", "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 12, "seed": 0,
    }  # fmt: skip
    assert Sampling() == Sampling("Describe this image in detail", 0.2, 0.9, 500, 0)  # the paper's


def test_bfloat16_captions_on_the_cpu(llava, photos):
    made = texts(load(llava, dtype="bfloat16", batch_size=6), images_to_caption(photos))
    assert all(text for text, _ in made.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"device": "warp"}, "device 'warp': expected one of cpu"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"tries": 0}, "tries must be positive, got 0"),
    ],
)
def test_wrong_options_are_named(llava, options, message):
    with pytest.raises(ValueError, match=message):
        load(llava, **options)


def test_a_device_that_is_not_there_is_named(llava):
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without an accelerator")
    with pytest.raises(ValueError, match="device 'cuda' is not here; there is cpu"):
        load(llava, device="cuda")


def test_what_is_no_captioning_model_is_named(backbones, tmp_path):
    with pytest.raises(ValueError, match="a bert model; expected one that generates text from images"):
        load(backbones / "text")
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load(tmp_path / "none")
    vision, text = ViTConfig(**SMALL, image_size=32, patch_size=8), BertConfig(**SMALL, vocab_size=100)
    text.is_decoder = text.add_cross_attention = True
    VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text).save_pretrained(tmp_path / "both")
    Florence2Config().save_pretrained(tmp_path / "florence")
    Blip2Config(text_config={"model_type": "t5"}).save_pretrained(tmp_path / "blip")
    for name in ("both", "florence", "blip"):
        with pytest.raises(ValueError, match=f"{name}: an encoder-decoder; expected a model that continues a prompt"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"prompt": " "},
    ],
)
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
