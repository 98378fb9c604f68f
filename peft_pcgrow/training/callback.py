"""Refresh the error map while a Trainer trains, and report it beside the losses."""

import inspect
import math
import operator
import os
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.architectures.adopted_experts import kind_of
from peft_pcgrow.architectures.host import CallbackHandler
from peft_pcgrow.maps.corpus import whole_number
from peft_pcgrow.maps.distributed import processes
from peft_pcgrow.maps.error_map import ErrorMap
from peft_pcgrow.maps.measure import GONE, measure_errors, whole_numbers
from peft_pcgrow.say import say
from peft_pcgrow.settings import refuse_gone

PREFIX = "pcgrow/"
# in every entry of the Trainer's log history that stands for a map
SECONDS = PREFIX + "seconds"


class ErrorMapCallback(TrainerCallback):
    """Measures the error map every so many steps of a transformers Trainer; training goes on bit for bit as without.

    Each map is an entry of its own in the Trainer's log history, at the step that it was measured after, and goes to
    all reporters (console, TensorBoard, W&B, trackio): mean loss and each layer's share of the error
    (`pcgrow/loss`, `pcgrow/layer_0_share`, ...), and what measuring has cost since training began or resumed:
    `pcgrow/seconds` and their share of the time, `pcgrow/time_share`. A map costs about as much as training steps on
    as many tokens. Without adapters of this package, too. Under DDP and FSDP2 every process measures the batches that
    it was given; weights sharded otherwise (FSDP1, ZeRO-3) are not supported.

    Args:
        batches: what `measure_errors` takes, in a form that can be read again at every refresh: a list, a data set, a
            DataLoader, or a function that returns an iterator anew.
        every (int or float): steps between two maps, from 1; or a share of all steps, between 0 and 1, as in
            TrainingArguments.
        at_start (bool): also measure before the first step (not when training resumes).
        at_end (bool): also measure after the last step, with `load_best_model_at_end` the model that was put back.
        keep (int): how many maps to hold in memory: the first one, and the newest `keep`.
        save_to (path): a folder; each map is saved to its `step-N`, and found there again when training resumes.
        max_share (float): a refresh that is due is skipped while measuring has taken more than this share of the time
            since training began, in (0, 1]; 1 never skips. `at_start` and `at_end` are not skipped.
        **measure: keyword arguments of `measure_errors`; without them no weight gradients and no progress bar. With
            `heldout`, the verdict of each map tells whether the model learns the domain or memorises the text.

    Attributes:
        maps: (step, map), newest last.
        seconds: spent in measuring.
        skipped: refreshes that `max_share` skipped.

    Raises:
        TypeError: batches that can be read only once, or an argument that `measure_errors` does not have.
        ValueError: no batches, or a number out of its range.
        FloatingPointError: in training, if the loss of a batch is NaN or infinite.

    Example:
        >>> callback = ErrorMapCallback(batches, every=2, max_share=1.0)
        >>> trainer.add_callback(callback)
        >>> done = trainer.train()  # prints what it logs
        {'pcgrow/loss': ...}
        >>> [step for step, emap in callback.maps]
        [0, 2, 4]
    """

    def __init__(
        self,
        batches: Any,
        every: int | float,
        *,
        at_start: bool = True,
        at_end: bool = True,
        keep: int = 10,
        save_to: str | os.PathLike | None = None,
        max_share: float = 0.1,
        **measure: Any,
    ):
        _check_renewable(batches)
        if isinstance(every, bool) or not isinstance(every, (int, float)):
            raise TypeError(f"every must be a number of steps or a share of them; got {every!r}")
        if not (every >= 1 if isinstance(every, int) else 0 < every < 1):
            raise ValueError(f"every must be a whole number of steps from 1, or a share between 0 and 1; got {every!r}")
        keep = whole_number("keep", keep, "maps")
        if not 0 < max_share <= 1:
            raise ValueError(f"max_share must be above 0 and at most 1 (1 never skips a refresh); got {max_share!r}")
        known = [p.name for p in inspect.signature(measure_errors).parameters.values() if p.kind is p.KEYWORD_ONLY]
        refuse_gone("measure_errors", {name: value for name, value in measure.items() if name in GONE}, GONE)
        if unknown := sorted(measure.keys() - set(known)):
            raise TypeError(f"measure_errors has no argument {', '.join(unknown)}; it has {', '.join(known)}")
        whole_numbers(**measure)
        for name in ("retain", "heldout"):
            if isinstance(measure.get(name), Iterator):
                raise TypeError(
                    f"{name} can be read only once, but is read at every refresh: give a list or a DataLoader"
                )
        self.folder = None if save_to is None else Path(save_to)
        if self.folder is not None and self.folder.is_file():
            raise FileExistsError(f"save_to={str(save_to)!r} is a file; maps are saved in a folder, give another name")
        self.batches, self.every, self.at_start, self.at_end = batches, every, at_start, at_end
        self.keep, self.max_share = keep, max_share
        self.measure = {"gradients": False, "progress": False, **measure}
        self.maps: list[tuple[int, ErrorMap]] = []
        self._start(0)

    def _start(self, max_steps: int) -> None:
        self.maps.clear()
        self.seconds, self.skipped, self._count, self._began = 0.0, 0, 0, time.perf_counter()
        self._interval = self.every if isinstance(self.every, int) else max(math.ceil(max_steps * self.every), 1)
        self._read: Any = None

    @property
    def map(self) -> ErrorMap | None:
        """The newest map; None before the first."""
        return self.maps[-1][1] if self.maps else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._start(state.max_steps)
        handler = _caller()
        if handler is not None and self in handler.callbacks:
            # reporters close when training ends: the last map must come before
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
        if self.folder is not None:
            self._find_saved([int(entry["step"]) for entry in state.log_history if SECONDS in entry])

    def _find_saved(self, steps: list[int]) -> None:
        wanted = sorted(set(steps))
        for step in wanted[:1] + wanted[1:][-self.keep :]:
            try:
                self.maps.append((step, ErrorMap.load(self._path(step))))
            except (OSError, ValueError) as error:
                say(f"pcgrow: training resumes without the error map of step {step}: {error}")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.at_start and state.global_step == 0 and not self.maps:
            return self._refresh(args, state, control, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step % self._interval == 0:
            if self._too_slow(args.device):
                self.skipped += 1
                if self.skipped == 1:
                    say(
                        f"pcgrow: the error map of step {state.global_step} is skipped: measuring has taken more than "
                        f"{self.max_share:.0%} of the training time; raise `every` or `max_share`, or lower max_tokens"
                    )
                return None
            return self._refresh(args, state, control, kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.at_end:
            measured = bool(self.maps) and self.maps[-1][0] == state.global_step
            if not measured or args.load_best_model_at_end:
                control = self._refresh(args, state, control, kwargs["model"])
        if self._count:
            say(
                f"pcgrow: {self._count} error maps took {self.seconds:.1f} s, {self._time_share():.1%} of the training "
                f"time; {self.skipped} refreshes were skipped (max_share={self.max_share})"
            )
        self._read = None
        return control

    def _refresh(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module
    ) -> TrainerControl:
        step = state.global_step
        _synchronize(args.device)
        began = time.perf_counter()
        with undisturbed(model):
            emap = measure_errors(model, self._anew(), **{"nodes": _grown_kind(model), **self.measure})
        taken = time.perf_counter() - began
        self.seconds, self._count = self.seconds + taken, self._count + 1
        if self._count == 1:
            limit = f", up to {self.max_share:.0%} of the training time" if self.max_share < 1 else ""
            say(
                f"pcgrow: an error map of {emap.tokens:,} tokens takes {taken:.2f} s; there is one every "
                f"{self._interval} steps{limit}"
            )
        if self.maps and self.maps[-1][0] == step:
            self.maps.pop()
        self.maps.append((step, emap))
        if len(self.maps) > self.keep + 1:
            del self.maps[1]
        if self.folder is not None and state.is_world_process_zero:
            emap.save(self._path(step))
        costs = {SECONDS: self.seconds, PREFIX + "time_share": self._time_share()}
        return _report(args, state, control, emap.scalars(PREFIX) | costs)

    def _anew(self) -> Any:
        if not _is_function(self.batches):
            return self.batches
        batches = self.batches()
        if isinstance(batches, Iterator) and batches is self._read:
            raise ValueError("the function given as batches returned the same iterator twice: make a new one in it")
        self._read = batches
        return batches

    def _too_slow(self, device: torch.device) -> bool:
        slow = self._time_share() > self.max_share
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # clocks differ, and a process that measures alone would wait for the others
            decision = torch.tensor([slow], dtype=torch.int32, device=device)
            dist.broadcast(decision, 0)
            slow = bool(decision)
        return slow

    def _time_share(self) -> float:
        return self.seconds / (time.perf_counter() - self._began)

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step-{step}"


def _check_renewable(batches: Any) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches can be read only once ({type(batches).__name__}), but is read at every refresh: give a list, a "
            "DataLoader, or a function that makes the iterator anew"
        )
    if not _is_function(batches) and not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(f"batches must be a list, a DataLoader or a function; got {type(batches).__name__}")
    if processes() == 1 and operator.length_hint(batches, 1) == 0:
        raise ValueError("batches is empty: give at least one batch of text to measure the error on")


def _is_function(batches: Any) -> bool:
    return callable(batches) and not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__")


def _report(
    args: TrainingArguments, state: TrainerState, control: TrainerControl, numbers: dict[str, float]
) -> TrainerControl:
    """What Trainer.log does with numbers, at any event.

    Setting `should_log` instead would log the training loss at other steps than the user asked for, and the Trainer
    copies its logs into the history before a callback could add to them.
    """
    logs = numbers if state.epoch is None else {**numbers, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    handler = _caller()
    if handler is None:
        say("pcgrow: no Trainer's CallbackHandler called, so an error map goes to the log history only")
        return control
    should_log = control.should_log
    control = handler.on_log(args, state, control, logs)
    control.should_log = should_log
    return control


def _caller() -> CallbackHandler | None:
    """The handler whose event is being handled, which alone reaches the reporters; None: no Trainer called."""
    # Of what transformers 5.24 gives to events (args, state, control, model, processing class, optimizer, scheduler,
    # data loaders) nothing leads to the Trainer or its handler, and accelerate's trackers are not those of a Trainer.
    # `control.should_log` logs the training loss instead (see `_report`), what `on_log` adds reaches no reporter before
    # this callback, new reporters would begin runs of their own, and Trainer(callbacks=) is before there is a Trainer.
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            return handler
        frame = frame.f_back
    return None


def _grown_kind(model: nn.Module) -> str | None:
    """Which kind of nodes grows, if it is one."""
    kinds = {kind_of(layer.base_layer) for layer in model.modules() if isinstance(layer, PCGrowExperts)}
    return kinds.pop() if len(kinds) == 1 else None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts random states back (a DataLoader draws even if it does not shuffle), and each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device.index for device in devices], device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        for module, training in modes:
            module.training = training


def _synchronize(device: torch.device) -> None:
    """Wait for the steps that are still queued, so that their time does not count as measuring."""
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize()
