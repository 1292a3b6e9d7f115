"""What TRL's trainer logs -> lines for people: every tenth of the training, and every evaluation."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class TrainingLog(TrainerCallback):
    """Logs a line for every tenth of the steps and for every evaluation, in the place of transformers' dictionaries."""

    def __init__(self) -> None:
        self.tenth = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Log training loss or validation metrics, in the main process."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        if "eval_log_loss" in logs:
            logger.info(
                "%s: validation log loss %.4f, accuracy %.4f", step, logs["eval_log_loss"], logs["eval_accuracy"]
            )
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        if "loss" in logs and tenth > self.tenth:
            self.tenth = tenth
            logger.info("%s: training loss %.4f", step, logs["loss"])
