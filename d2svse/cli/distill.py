"""`d2svse distill`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from d2svse.cli.common import examples
from d2svse.cli.options import with_flags
from d2svse.cli.train import Config, Set, SimilarityArg, run_training, training_flags

EXAMPLES = examples(
    "d2svse distill TEACHER --train t.jsonl --val v.jsonl --model M -o runs/a",
    "d2svse distill TEACHER --config a.yaml --teacher-metric diagonal -o runs/b",
)


@with_flags(training_flags("teacher", "stages"))
def distill(
    teacher: Annotated[str, typer.Argument(help="Trained retrieval model with any similarity: Hub id or folder.")],
    config: Config = None,
    similarity_arg: SimilarityArg = None,
    set_: Set = None,
    **given: Any,
) -> None:
    """Train a student on sparse captions and on the scores of a teacher, by KL divergence.

    Give --train, --val and --output, and either --model or both --vision and --text for the student. The student keeps
    its own similarity. --teacher-metric learns a GSSF metric on the teacher's scores alone.
    """
    stage = {"teacher": teacher, "stages": "align"}
    run_training(config, similarity_arg, set_, {**given, **stage}, {"distill_loss": "kl"})
