"""`d2svse caption local`, `endpoint`, `shorten` and `report`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2svse import choices
from d2svse.cli.common import Device, OnBadImage, examples, prepare_process, print_table
from d2svse.cli.options import with_flags
from d2svse.files.data import to_json
from d2svse.text import visible

if TYPE_CHECKING:
    from d2svse.captioning.images import Sampling

KEY_VARIABLE = "D2SVSE_API_KEY"

app = typer.Typer(help="Make and check dense captions of images.", no_args_is_help=True)


def _caption(
    make: Callable[..., Any],
    *,
    source: Annotated[str, typer.Argument(help="A folder of images, a manifest, or another data layout.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The dense .jsonl to write; a stopped run continues it.")
    ],
    split: Annotated[str | None, typer.Option(help="Split, for a layout with several.")] = None,
    image_folder: Annotated[Path | None, typer.Option(help="Folder that relative image paths start from.")] = None,
    prompt: Annotated[str, typer.Option(help="Question to the model.")] = "Describe this image in detail",
    temperature: Annotated[float, typer.Option(help="Temperature of sampling; 0 takes the likeliest token.")] = 0.2,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the longest caption.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    part: Annotated[
        str, typer.Option(help="i/n: caption every n-th image from the i-th, on one of n machines.")
    ] = "1/1",
    sentences: Annotated[
        int | None, typer.Option(min=1, help="Write the first N sentences of each caption to a second file.")
    ] = None,
    on_bad_image: OnBadImage = "error",
) -> None:
    """Caption the images without a caption, print a summary, and exit with 1 if images are left.

    The options are those of both commands. `make` returns the captioner for a `Sampling`, and notes for the output.
    """
    from d2svse.captioning.images import Sampling, images_to_caption, take_part
    from d2svse.captioning.report import shorten_captions
    from d2svse.captioning.running import caption_images
    from d2svse.version import __version__

    sampling = Sampling(prompt, temperature, top_p, max_new_tokens, seed)
    skips = on_bad_image == "skip"
    images = images_to_caption(source, split=split, image_folder=image_folder, allow_missing=skips)
    images = take_part(images, part)
    captioner, notes = make(sampling)
    notes = {"d2svse": __version__, **notes}
    options: dict[str, Any] = {"notes": notes, "on_bad_image": on_bad_image, "show_progress_bar": True}
    summary = caption_images(captioner, images, output, captioner.settings, **options)
    skipped = f", {len(summary.skipped)} broken ones skipped" if summary.skipped else ""
    typer.echo(
        f"{visible(str(output))}: {summary.done} of {len(images)} images have a caption, "
        f"{summary.made} of them new{skipped}"
    )
    if sentences is not None and summary.done:
        short = output.with_name(f"{output.stem}-{sentences}-sentences.jsonl")
        shorten_captions(output, short, sentences)
        typer.echo(f"{visible(str(short))}: the first {sentences} sentences of each")
    if summary.left:
        failed = ""
        if summary.failed:
            name, reason = next(iter(summary.failed.items()))
            failed = f", {len(summary.failed)} of them failed, listed in {summary.failed_path} ({name}: {reason})"
        message = f"d2svse: {summary.left} images have no caption yet{failed}; run the same command to try them again"
        typer.echo(visible(" ".join(message.split())), err=True)
        raise typer.Exit(1)


SHARED = [*inspect.signature(_caption, eval_str=True).parameters.values()][1:]


@app.command(
    "local",
    epilog=examples(
        "d2svse caption local llava-hf/llava-1.5-13b-hf photos -o dense.jsonl",
        "d2svse caption local MODEL train.jsonl -o dense-1.jsonl --part 1/4",
    ),
)
@with_flags(SHARED)
def local(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a LLaVA or another model of transformers.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
    dtype: Annotated[choices.Dtype, typer.Option(help="Type of the weights.")] = "bfloat16",
    device: Device = None,
    batch_size: Annotated[int, typer.Option(help="Images captioned at a time.")] = 8,
    tries: Annotated[int, typer.Option(help="Texts sampled before an image counts as failed.")] = 3,
    **shared: Any,
) -> None:
    """Caption images with a model on this machine."""
    prepare_process(device)
    import torch
    import transformers

    from d2svse.captioning.llava import LlavaCaptioner

    def make(sampling: Sampling) -> tuple[LlavaCaptioner, dict[str, str]]:
        options: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device}
        captioner = LlavaCaptioner.from_pretrained(model, sampling, batch_size=batch_size, tries=tries, **options)
        return captioner, {"torch": torch.__version__, "transformers": transformers.__version__}

    _caption(make, **shared)


@app.command(
    "endpoint", epilog=examples("d2svse caption endpoint http://gpu:8000/v1 photos --model llava -o out.jsonl")
)
@with_flags(SHARED)
def endpoint(
    url: Annotated[str, typer.Argument(help="Base URL of the API, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="Name of the model at the endpoint.")],
    concurrency: Annotated[int, typer.Option(help="Largest number of open requests.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a whole answer.")] = 120.0,
    tries: Annotated[int, typer.Option(help="Requests for an image before it counts as failed.")] = 5,
    max_requests: Annotated[
        int | None, typer.Option(help="Largest number of requests of this run, repeated ones included.")
    ] = None,
    backoff: Annotated[float, typer.Option(help="Seconds before the second try; they double with each try.")] = 1.0,
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the API key.")] = KEY_VARIABLE,
    **shared: Any,
) -> None:
    """Caption images with an OpenAI-compatible endpoint, such as vLLM or TGI."""
    from d2svse.captioning.endpoint import EndpointCaptioner

    key = os.environ.get(api_key_env, "").strip() or None
    if key is None and api_key_env != KEY_VARIABLE:
        raise ValueError(f"--api-key-env {api_key_env}: the environment variable is not set, or it is empty")

    def make(sampling: Sampling) -> tuple[EndpointCaptioner, dict[str, str]]:
        limits: dict[str, Any] = {"timeout": timeout, "tries": tries, "max_requests": max_requests, "backoff": backoff}
        captioner = EndpointCaptioner(url, model, sampling, api_key=key, concurrency=concurrency, **limits)
        return captioner, {"url": captioner.base}

    _caption(make, **shared)


@app.command("shorten", epilog=examples("d2svse caption shorten dense.jsonl --sentences 2 -o short.jsonl"))
def shorten(
    file: Annotated[Path, typer.Argument(help="A dense .jsonl.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .jsonl to write.")],
    sentences: Annotated[int, typer.Option(min=1, help="Sentences to keep.")],
) -> None:
    """Keep the first sentences of each caption."""
    from d2svse.captioning.report import shorten_captions

    if output.exists():
        raise FileExistsError(f"{output}: already exists; give another name")
    count = shorten_captions(file, output, sentences)
    typer.echo(f"{visible(str(output))}: {count} captions of at most {sentences} sentences")


@app.command(
    "report",
    epilog=examples(
        "d2svse caption report dense.jsonl",
        "d2svse caption report dense.jsonl --text google-bert/bert-base-uncased",
    ),
)
def report(
    file: Annotated[Path, typer.Argument(help="A dense .jsonl.")],
    text: Annotated[str | None, typer.Option(help="Hub id or folder of a text encoder or model.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens that the encoder reads.", show_default="the encoder's limit")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report lengths in words and tokens, and truncated, repeated and empty captions."""
    if max_length is not None and (text is None or max_length < 1):
        raise ValueError(
            "--max-length takes a positive number of tokens, and needs an encoder that counts them (--text)"
        )
    from dataclasses import asdict

    from d2svse.captioning.report import load_tokenizer, report_captions

    tokenizer, limit = None, None
    if text is not None:
        prepare_process("cpu")
        tokenizer, limit = load_tokenizer(text)
    found = report_captions(file, tokenizer, max_length or limit)
    if as_json:
        typer.echo(to_json(asdict(found)))
        return
    rows = {"words": found.words} | ({"tokens": found.tokens} if found.tokens else {})
    names = list(found.words)
    print_table(
        names,
        {row: [f"{figures[name]:.1f}".removesuffix(".0") for name in names] for row, figures in rows.items()},
        f"{found.captions} captions, {file.name}",
    )
    if found.truncated is not None:
        share = 100 * found.truncated / (found.captions - len(found.empty))
        typer.echo(f"longer than {found.max_length} tokens, so truncated: {found.truncated} ({share:.1f} %)")
    if found.unfinished is not None:
        typer.echo(f"cut at the captioning model's limit: {found.unfinished}")
    typer.echo(f"equal to an earlier caption: {found.duplicates}")
    first = [f'{name} ("{phrase[:60]}")' for name, phrase in list(found.repeating.items())[:5]]
    typer.echo(f"repeating themselves: {len(found.repeating)}{_listed(first)}")
    typer.echo(f"empty: {len(found.empty)}{_listed(found.empty[:5])}")


def _listed(names: list[str]) -> str:
    return f"; the first: {visible(', '.join(names))}" if names else ""
