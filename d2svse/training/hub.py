"""Pushing what a `Trainer` has trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2svse.data import ImageTextDataset
from d2svse.hub import CardFacts, Pushed, make_repository
from d2svse.training.run_card import run_card


class HubMixin:
    """`Trainer(push_to_hub=True)`: the repository is made before training, the model pushed after it, with a card."""

    args: Any
    model: Any
    state: Any
    accelerator: Any
    hub_model_id: str | None
    is_world_process_zero: Callable[[], bool]
    _datasets: dict[str, ImageTextDataset]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository that the model shall be pushed to; transformers calls it before training."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = make_repository(name, private=private, token=token or self.args.hub_token)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        facts: CardFacts | None = None,
    ) -> Pushed | None:
        """Push the model as it is, with its processor and a model card; training does so at its end.

        Args:
            commit_message: the commit's title.
            token: instead of `args.hub_token`, or of the environment's.
            revision: instead of `args.hub_revision`.
            private: instead of `args.hub_private_repo`.
            facts: what the model card shall say that nothing here tells.

        Returns:
            What was pushed where; None in all processes but the first.
        """
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.push_to_hub(
            self.hub_model_id,
            run_card=run_card({"seed": self.args.seed}, self._datasets, self._measured(), sys.argv),
            facts=facts,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
        )

    def _measured(self) -> dict[str, dict[str, float]]:
        """The validation metrics of the weights that the model has now, if known, by the stage's name."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        step = best or self.state.global_step
        logs = [row for row in self.state.log_history if row["step"] == step and "eval_rsum" in row]
        kept = {name.removeprefix("eval_"): value for row in logs for name, value in row.items() if "eval_" in name}
        return {self.args.stage: kept} if kept else {}

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push no checkpoints: the model is pushed once, at the end, and never a pickle of the arguments."""
