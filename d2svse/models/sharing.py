"""Pushing a model to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any


class SharingMixin:
    """`push_to_hub` of a model that has a processor, in place of that of transformers."""

    processor: Any
    save_pretrained: Callable[..., None]

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any) -> Any:
        """Push weights, configuration, processor and a model card to the Hub, in one commit.

        Args:
            repo_id: name of the repository; it is made if there is none.
            max_shard_size: largest file of weights, such as "5GB".
            **options: as of `d2svse.hub.push_folder`: `private`, `token`, `revision`, `commit_message`,
                `create_pr`, `facts` and `results`; `run_card`, what the model card tells of training.

        Returns:
            What was pushed where, a `d2svse.hub.Pushed`.

        Raises:
            ValueError: if the name is not allowed, or the model has no processor.
            OSError: if the Hub cannot be reached or refuses; the message says why.
        """
        if self.processor is None:
            raise ValueError("the model has no processor; set model.processor before it is pushed")
        from d2svse.hub import push_folder  # which needs this class

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(folder, repo_id, **options)
