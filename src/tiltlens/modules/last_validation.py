"""A run ends with a validation, so that figures and pictures of the final weights are on record."""

from typing import Any

from lightning import Callback, LightningModule, Trainer


class LastValidation(Callback):
    """Validates after the last step, where trainer.val_check_interval does not fall on it.

    Lightning validates before it stops where trainer.should_stop is set, as it is by trainer.max_time; here it is set at
    the last of max_steps or max_epochs, too. Others read from it that a validation is the last. With
    check_val_every_n_epoch = n above 1 only every n-th epoch is validated, the last or not.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps_are_over = 0 < trainer.max_steps <= trainer.global_step
        if steps_are_over or (trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs):
            trainer.should_stop = True
