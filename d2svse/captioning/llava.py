"""Caption images with a transformers model that generates text from an image and a text, such as LLaVA."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from d2svse.captioning.images import ImageToCaption, Outcome, Sampling
from d2svse.captioning.text import find_fault
from d2svse.choices import Dtype, check_counts, check_type
from d2svse.cpu import choose_device
from d2svse.hub.folder import check_contents, loading
from d2svse.hub.weights import check_finite, weight_files
from d2svse.images import ImageError, load_image

# The template of LLaVA-1.5's training, for processors without a chat template.
PLAIN_TEMPLATE = "USER: {image}\n{prompt} ASSISTANT:"


class SeededSampling(LogitsProcessor):
    """Samples the next token of each row with the row's own random numbers.

    All other tokens get a score of minus infinity, so that greedy decoding takes the sampled token. So the token
    depends only on the seed and the scores of its row, whatever the other rows of the batch are. It is the first
    token, in the order of the vocabulary, whose cumulative probability exceeds a uniform random number.

    Args:
        seeds: one seed for each row.
        temperature: temperature of sampling, above 0.
        top_p: total probability of the tokens to sample from, see `Sampling`.
        prompt_length: tokens before the first sampled token, padding included.
        max_new_tokens: number of random numbers for each row.
    """

    def __init__(
        self, seeds: Sequence[int], temperature: float, top_p: float, prompt_length: int, max_new_tokens: int
    ) -> None:
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.prompt_length = prompt_length
        self.uniform = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores that leave one token of each row: `(n_rows, n_tokens)` to `(n_rows, n_tokens)` float32."""
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64  # mps has no float64
        probabilities = self.warpers(input_ids, scores.float()).to(dtype).softmax(-1)
        cumulative = probabilities.cumsum(-1)
        uniform = torch.as_tensor(self.uniform[:, input_ids.shape[1] - self.prompt_length, None])
        threshold = uniform.to(cumulative) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True)
        last = (probabilities > 0).cumsum(-1).argmax(-1, keepdim=True)  # rounding may otherwise reach a later token
        return torch.full_like(scores, -torch.inf, dtype=torch.float32).scatter(1, torch.minimum(drawn, last), 0.0)


class LlavaCaptioner:
    """Captions images in batches.

    An empty or repetitive text is discarded, and another one is sampled.

    Args:
        model: a model that generates text from images and text.
        processor: the processor of the model.
        sampling: settings of the captions.
        batch_size: images captioned at a time.
        tries: texts sampled for an image before it counts as failed.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, model: Any, processor: Any, sampling: Sampling, batch_size: int = 8, tries: int = 3) -> None:
        check_counts(batch_size=batch_size, tries=tries)
        self.model, self.processor, self.sampling = model, processor, sampling
        self.batch_size, self.tries = batch_size, tries if sampling.temperature > 0 else 1
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        config = copy.deepcopy(model.generation_config)
        config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)
        config.update(max_new_tokens=sampling.max_new_tokens, pad_token_id=processor.tokenizer.pad_token_id)
        self.generation_config = config

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        sampling: Sampling,
        *,
        revision: str | None = None,
        dtype: str = "bfloat16",
        device: str | None = None,
        batch_size: int = 8,
        tries: int = 3,
    ) -> LlavaCaptioner:
        """Load a model and its processor from the Hub or a folder.

        Args:
            name: Hub id or folder.
            sampling: settings of the captions.
            revision: revision of the model on the Hub.
            dtype: "bfloat16", "float16" or "float32".
            device: device such as "cuda:1" or "cpu"; None for the first accelerator, or else the CPU.
            batch_size: images captioned at a time.
            tries: texts sampled for an image before it counts as failed.

        Raises:
            OSError: if the model does not exist or lacks a file.
            ValueError: if the model does not generate text from images, or the dtype or the device is unknown.
        """
        check_type("dtype", dtype, Dtype)
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise FileNotFoundError(f"{name}: no such model folder")
        target = choose_device(device)
        if Path(name).is_dir():
            check_contents(name, max_image_size=math.inf)
        safe: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        with loading(name):
            config = AutoConfig.from_pretrained(name, **safe)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                f"{name}: a {config.model_type} model; expected one that generates text from images, such as llava"
            )
        if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
            raise ValueError(f"{name}: an encoder-decoder; expected a model that continues a prompt, such as llava")
        with loading(name):
            processor = AutoProcessor.from_pretrained(name, **safe)
            model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **safe)
        if getattr(processor, "tokenizer", None) is None:
            raise ValueError(f"{name}: its processor has no tokenizer; expected one for images and texts, as llava's")
        check_finite(model, weight_files(Path(name), name) if Path(name).is_dir() else (), name)
        return cls(model.to(target).eval(), processor, sampling, batch_size, tries)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the captions depend on."""
        made_by = {
            "made_by": "transformers",
            "model": self.model.name_or_path,
            "commit": getattr(self.model.config, "_commit_hash", None),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        return {**made_by, **asdict(self.sampling)}

    def run(self, images: Sequence[ImageToCaption], take: Callable[[Outcome], None]) -> None:
        """Caption all images; see `Captioner`."""
        queue = deque((image, image.draw) for image in images)
        while queue:
            batch = [queue.popleft() for _ in range(min(self.batch_size, len(queue)))]
            rows, pixels, seeds = [], [], []
            for image, draw in batch:
                try:
                    pixels.append(load_image(image.path))
                except ImageError as error:
                    take(Outcome(image, reason=str(error), draw=draw))
                    continue
                rows.append((image, draw))
                seeds.append(self.sampling.image_seed(image.path.read_bytes(), draw))
            if not rows:
                continue
            for (image, draw), seed, (text, finish) in zip(rows, seeds, self.generate(pixels, seeds), strict=True):
                fault = find_fault(text)
                outcome = Outcome(image, text, seed, finish, draw=draw)
                if fault is None:
                    take(outcome)
                elif draw + 1 - image.draw < self.tries:
                    queue.append((image, draw + 1))
                else:
                    take(replace(outcome, text=None, reason=fault, draw=draw + 1))

    @torch.inference_mode()
    def generate(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[tuple[str, str]]:
        """Return the text of each image with "stop", or with "length" if the text was cut."""
        inputs = self._inputs(images).to(self.model.device, self.model.dtype)
        length, sampling = inputs["input_ids"].shape[1], self.sampling
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            drawing = (sampling.temperature, sampling.top_p, length, sampling.max_new_tokens)
            processors.append(SeededSampling(seeds, *drawing))
        ids = self.model.generate(**inputs, generation_config=self.generation_config, logits_processor=processors)
        new = ids[:, length:]
        ends = self.generation_config.eos_token_id
        ends = torch.as_tensor([] if ends is None else ends, device=new.device, dtype=new.dtype).flatten()
        stopped = torch.isin(new, ends).any(dim=1).tolist()
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            (text.strip(), "stop" if stop or new.shape[1] < sampling.max_new_tokens else "length")
            for text, stop in zip(texts, stopped, strict=True)
        ]

    def _inputs(self, images: Sequence[Image.Image]) -> Any:
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self.processor.chat_template is None:
            image = getattr(self.processor, "image_token", "<image>")
            text = PLAIN_TEMPLATE.format(image=image, prompt=self.sampling.prompt)
            return self.processor(images=list(images), text=[text] * len(images), **options)
        question = {"type": "text", "text": self.sampling.prompt}
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, question]}] for image in images
        ]
        return self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=options
        )
