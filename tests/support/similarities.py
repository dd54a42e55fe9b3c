"""The names of similarities, so that a new one joins the common tests."""

from __future__ import annotations

from d2svse.similarity import Similarity, build_similarity, similarity_names


def names_of(kind: type[Similarity]) -> list[str]:
    """Return the names of all similarities that are of a class."""
    return [name for name in similarity_names() if isinstance(build_similarity(name, 8), kind)]
