"""`d2svse train`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from d2svse.cli.common import examples, parse_assignments, prepare_process, print_recalls

OUT_OF_MEMORY = "memory ran out: lower --batch-size, or keep it and encode in parts with --chunk-size"
_DATA, _MODEL, _TRAINING = "Data", "Model", "Training"

EXAMPLES = examples(
    "d2svse train --train train.jsonl --val val.jsonl --model MODEL -o runs/a",
    "d2svse train --config runs/a/recipe.yaml --lr 3e-4 -o runs/b",
    "d2svse train --config runs/b/recipe.yaml --resume",
)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Let one of the processes that train together say why they all end, in one sentence."""
    import torch

    from d2svse.training.distributed import is_main_process, lost_another, speaks_first

    try:
        yield
    except KeyboardInterrupt as stop:
        if is_main_process():
            typer.echo(f"d2svse: {str(stop) or 'stopped before training'}", err=True)
        raise typer.Exit(130) from None
    except (OSError, ValueError, ImportError):
        if speaks_first():
            raise
        raise typer.Exit(2) from None
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{OUT_OF_MEMORY} ({str(error).partition('.')[0]})") from None
    except MemoryError:
        raise ValueError(OUT_OF_MEMORY) from None
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise ValueError(OUT_OF_MEMORY) from None
        if not lost_another(error):
            raise
        if speaks_first():
            raise OSError("another process of this run has ended; its own message, or torchrun's, says why") from None
        raise typer.Exit(2) from None


def train(
    config: Annotated[Path | None, typer.Option(help="YAML file with these options; those given here win.")] = None,
    train: Annotated[
        str | None, typer.Option(help="Manifest or other layout of the training set.", rich_help_panel=_DATA)
    ] = None,
    val: Annotated[
        str | None, typer.Option(help="Manifest or other layout of the validation set.", rich_help_panel=_DATA)
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(help="Split, where the layout has several.", rich_help_panel=_DATA)
    ] = None,
    val_split: Annotated[str | None, typer.Option(help="The same for validation.", rich_help_panel=_DATA)] = None,
    image_folder: Annotated[
        str | None, typer.Option(help="Where relative image paths start.", rich_help_panel=_DATA)
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Dense text: auto, field, concat or a JSONL file.", show_default="auto", rich_help_panel=_DATA
        ),
    ] = None,
    on_bad_image: Annotated[
        str | None, typer.Option(help="error or skip.", show_default="error", rich_help_panel=_DATA)
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="Vision backbone: Hub id or folder.", rich_help_panel=_MODEL)
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text backbone: Hub id or folder.", rich_help_panel=_MODEL)] = None,
    model: Annotated[
        str | None, typer.Option(help="Start from this model instead of backbones.", rich_help_panel=_MODEL)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Stage-1 model to distil from, where --model is of stage 2 already.", rich_help_panel=_MODEL),
    ] = None,
    embed_dim: Annotated[
        int | None, typer.Option(help="Width of the joint space.", show_default="512", rich_help_panel=_MODEL)
    ] = None,
    similarity: Annotated[
        str | None,
        typer.Option(
            help="Name of the similarity, such as max-mean or omit.", show_default="cosine", rich_help_panel=_MODEL
        ),
    ] = None,
    similarity_arg: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the similarity.", rich_help_panel=_MODEL)
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for all results.")] = None,
    stages: Annotated[
        str | None, typer.Option(help="In order: pretrain, distill, align.", show_default="pretrain,distill")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper, published or recommended.", show_default="recommended")
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Epochs of each stage.", show_default="of the preset", rich_help_panel=_TRAINING),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs a batch.", show_default="of the preset", rich_help_panel=_TRAINING)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", show_default="of the preset", rich_help_panel=_TRAINING)
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="infonce, hinge, cmpm or max-polynomial.", show_default="of the preset", rich_help_panel=_TRAINING
        ),
    ] = None,
    freeze_vision: Annotated[
        bool, typer.Option("--freeze-vision", help="Keep the vision backbone as it is.", rich_help_panel=_TRAINING)
    ] = False,
    freeze_text: Annotated[
        bool, typer.Option("--freeze-text", help="Keep the text backbone as it is.", rich_help_panel=_TRAINING)
    ] = False,
    lora: Annotated[
        str | None,
        typer.Option(
            help="Train LoRA matrices in place of a backbone: vision, text or both.", rich_help_panel=_TRAINING
        ),
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Train in bfloat16 mixed precision.", rich_help_panel=_TRAINING)
    ] = False,
    cache_image_tokens: Annotated[
        str | None,
        typer.Option(
            help="Folder to keep the tokens of a frozen vision backbone in: pictures are encoded once.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(help="Pairs encoded at a time, for batches larger than memory.", rich_help_panel=_TRAINING),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that prepare samples.", rich_help_panel=_TRAINING)
    ] = None,
    on_nonfinite: Annotated[
        str | None,
        typer.Option(
            help="At a NaN or infinite loss: error, or skip the step.", show_default="error", rich_help_panel=_TRAINING
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE of any TrainingArguments field, STAGE.KEY=VALUE for one stage.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The one seed of the run.", show_default="42")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="ORG/NAME on the Hub: push the model there at the end, with a model card.")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who may see it there.", show_default="as its owner has set"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run with this output stopped.")] = False,
) -> None:
    """Train a model in two stages, or in one of them.

    It needs --train, --val, --output, and --vision with --text, or --model; or --config.
    """
    prepare_process()
    from d2svse.training.distributed import is_main_process
    from d2svse.training.recipe import STAGES, Recipe, read_recipe, run_recipe

    with _one_sentence():
        values: dict[str, Any] = read_recipe(config) if config else {}
    given = {
        "train": train, "val": val, "train_split": train_split, "val_split": val_split,
        "image_folder": image_folder, "dense": dense, "on_bad_image": on_bad_image,
        "vision": vision, "text": text, "model": model, "teacher": teacher, "output": output,
        "preset": preset, "seed": seed, "stages": stages, "push_to_hub": push_to_hub, "hub_private": private,
        "resume": resume or None,
    }  # fmt: skip
    values |= {name: value for name, value in given.items() if value is not None}

    def section(name: str) -> dict[str, Any]:
        if not isinstance(values.get(name) or {}, dict):
            raise ValueError(f"{config}: {name} must be a mapping, got {values[name]!r:.80}")
        values[name] = dict(values.get(name) or {})
        return values[name]

    if embed_dim is not None:
        section("model_options")["embed_dim"] = embed_dim
    if similarity is not None or similarity_arg:
        arguments = parse_assignments(similarity_arg or [], "--similarity-arg")
        section("model_options")["similarity"] = {"name": similarity or "cosine", **arguments}
    training = {
        "num_train_epochs": epochs, "per_device_train_batch_size": batch_size, "learning_rate": lr, "loss": loss,
        "freeze_vision": freeze_vision or None, "freeze_text": freeze_text or None, "bf16": bf16 or None,
        "dataloader_num_workers": workers, "cache_image_tokens": cache_image_tokens, "chunk_size": chunk_size,
        "on_nonfinite": on_nonfinite, "lora": lora,
    }  # fmt: skip
    section("training").update({name: value for name, value in training.items() if value is not None})
    for key, value in parse_assignments(set_ or [], "--set").items():
        stage, dot, name = key.partition(".")
        if dot and stage not in STAGES:
            raise ValueError(f"--set {key}: no stage {stage!r}; known are {', '.join(STAGES)}")
        section(stage if dot else "training")[name if dot else key] = value

    with _one_sentence():
        recipe = Recipe.from_mapping(values, config or "options")
        results = run_recipe(recipe)
    if not is_main_process():
        return
    print_recalls(results, f"validation, {Path(recipe.val).name}")
    typer.echo(f"model: {Path(recipe.output) / 'model'}")
    if recipe.push_to_hub:
        typer.echo(f"pushed to {recipe.push_to_hub}")
