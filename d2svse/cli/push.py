"""`d2svse push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import examples, prepare_process, show_transfers

_CARD = "Model card"

EXAMPLES = examples("d2svse push runs/a/model org/name --private --license apache-2.0")


def push(
    folder: Annotated[Path, typer.Argument(help="A saved model, such as the folder `model` of a training run.")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME on the Hub; created if it does not exist.")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility of a new repository.", show_default="the default of the owner"
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if it does not exist.")] = None,
    message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload model",
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request against the branch instead of a commit.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="The Hub's name of the licence, such as apache-2.0.", rich_help_panel=_CARD)
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Language of the captions, such as en.", rich_help_panel=_CARD)
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of training data.", rich_help_panel=_CARD)] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Further tag.", rich_help_panel=_CARD)] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="File of d2svse eval --output, for the table of results.", rich_help_panel=_CARD),
    ] = None,
    eval_dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="PROTOCOL=ORG/NAME: Hub id of the data of a protocol's results, for .eval_results.",
            rich_help_panel=_CARD,
        ),
    ] = None,
) -> None:
    """Push a model with its processor and a model card to the Hub.

    HF_TOKEN or `hf auth login` gives the access token.
    """
    facts = {}
    for assignment in eval_dataset or []:
        protocol, equals, name = assignment.partition("=")
        if not (protocol and equals and name):
            raise ValueError(f"--eval-dataset takes PROTOCOL=ORG/NAME, got {assignment!r}")
        facts[protocol] = name
    prepare_process("cpu")
    show_transfers()
    from d2svse.hub import CardFacts, push_folder
    from d2svse.text import visible

    fingerprint = None
    if results:
        from d2svse.models import D2SVSE, model_fingerprint

        fingerprint = model_fingerprint(D2SVSE.from_pretrained(folder))

    pushed = push_folder(
        folder,
        repository,
        facts=CardFacts(license, language or (), dataset or (), facts, tag or ()),
        results=results or (),
        fingerprint=fingerprint,
        private=private,
        revision=revision,
        commit_message=message,
        create_pr=pull_request,
    )
    if pushed.left_out:
        typer.echo(
            f"not pushed, because they are not files of a model: {visible(', '.join(pushed.left_out))}", err=True
        )
    if pushed.card_kept:
        typer.echo(f"{pushed.repo_id} keeps its model card, which no push wrote", err=True)
    typer.echo(pushed.url)
