"""Fit newborns' gates anew while a Trainer trains them."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_pcgrow.architectures.engines import inside
from peft_pcgrow.say import say
from peft_pcgrow.training.callback import undisturbed

# of all steps, those before gates are fitted anew: on scripture, a model of 6.6 million parameters and 240 steps, once
# after 40 of them made the gain 1.12 times as large at no more forgetting
SHARE = 1 / 6


def usual_step(total: int) -> int:
    """After which of all steps gates are fitted anew, unless somebody says otherwise."""
    return max(1, round(SHARE * total))


class RefitGatesCallback(TrainerCallback):
    """Calls `refit_gates` after some steps of a transformers Trainer; what is random goes on as without.

    Newborns change what the layers above them read: their gates, fitted before, then shut out the domain. A checkpoint
    holds the gates as they are, so training that resumes goes on alike.

    Args:
        batches: text of the domain, as for `PCGrowModel.refit_gates`, in a form that can be read again.
        retain: text that must stay, likewise.
        steps (sequence of int): after which steps; None: once, after a sixth of all.
        adapter_name (str): an active adapter with newborns; None: those that train.
        batch_size (int): texts a batch, of those that are not batched yet.

    Raises:
        ValueError: steps below 1; in training, what `refit_gates` raises.

    Example:
        >>> emap = measure_errors(model, batches, retain=retain, progress=False)
        >>> grown = get_peft_model(model, PCGrowConfig(error_map=emap, grow="spawn", budget=0.1, gate_fpr=0.2))
        >>> callback = RefitGatesCallback(batches, retain, steps=[2])  # Trainer(callbacks=[callback])
        >>> callback.steps
        (2,)
    """

    def __init__(
        self,
        batches: Any,
        retain: Any,
        steps: Sequence[int] | None = None,
        adapter_name: str | None = None,
        batch_size: int = 8,
    ):
        if steps is not None and any(type(step) is not int or step < 1 for step in steps):
            raise ValueError(f"steps={steps!r} must be whole numbers from 1, after which gates are fitted anew")
        self.steps = None if steps is None else tuple(steps)
        self.texts, self.adapter_name, self.batch_size = (batches, retain), adapter_name, batch_size

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.steps and min(self.steps) > state.max_steps:
            say(f"pcgrow: gates will not be fitted anew: after steps {self.steps}, and training has {state.max_steps}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        steps = (usual_step(state.max_steps),) if self.steps is None else self.steps
        if state.global_step in steps:
            self.refit(inside(kwargs["model"]))

    def refit(self, model: Any) -> None:
        """Do it now."""
        with undisturbed(model):
            model.refit_gates(*self.texts, adapter_name=self.adapter_name, batch_size=self.batch_size)
