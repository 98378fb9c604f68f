"""A run leaves the caller's base, and random numbers, as it found them."""

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from peft_pcgrow.adapter.model import PCGrowModel
from peft_pcgrow.atomic import completed
from peft_pcgrow.rounds.host import INPUT_HOOKS

# what training may switch on modules of the base
SWITCHES = ("training", "gradient_checkpointing")


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Inside, adapters grow on a model, and train. Afterwards random numbers, `config.use_cache`, gradient
    checkpointing and what is in training mode are as before; after an exception new adapters are gone, too, wherever it
    came, and earlier ones active as they were. Parameters train as before unless new adapters are left.
    """
    state, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    python, array = random.getstate(), np.random.get_state()
    switches = [
        (module, {name: vars(module)[name] for name in SWITCHES if name in vars(module)}) for module in model.modules()
    ]
    trains = [(p, p.requires_grad) for p in model.parameters()]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    hooked = _hooked(model)
    earlier = adapters_of(model)

    def put_back() -> None:
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        random.setstate(python)
        np.random.set_state(array)
        if config is not None and cached is not None:
            config.use_cache = cached
        for module, held in switches:
            for name in SWITCHES:
                vars(module).pop(name, None)
            vars(module).update(held)
        grown = adapters_of(model) != earlier
        for p, flag in trains if not grown else ():
            p.requires_grad_(flag)
        if _hooked(model) and not hooked and not (grown and getattr(model, "is_gradient_checkpointing", False)):
            model.disable_input_require_grads()  # type: ignore[operator]

    try:
        with or_none(model):
            yield
    finally:
        completed(put_back)


@contextmanager
def or_none(model: nn.Module) -> Iterator[None]:
    """Inside, adapters are added to a model; after an exception, wherever it came, these are gone, and earlier ones
    active as they were."""
    earlier = adapters_of(model)
    active = list(getattr(model, "active_adapters", ())) if earlier else []
    try:
        yield
    except BaseException:
        completed(lambda: take_back(model, earlier, active) if earlier else _unload(model))
        raise


def adapters_of(model: nn.Module) -> list[str]:
    """All that a model carries, active or not."""
    return list(getattr(model, "peft_config", ()))


def take_back(model: nn.Module, earlier: Sequence[str], active: Sequence[str]) -> None:
    """Delete adapters but earlier ones, and make some of these active, of which none trains."""
    for name in [name for name in adapters_of(model) if name not in earlier]:
        model.delete_adapter(name)  # type: ignore[operator]
    model.base_model.set_adapter(list(active))  # type: ignore[operator,union-attr]
    model.requires_grad_(False)


def _hooked(model: nn.Module) -> bool:
    """Whether what is embedded takes part in autograd, as PEFT has it where activations are checkpointed."""
    return any(getattr(model, name, None) for name in INPUT_HOOKS)


def _unload(model: nn.Module) -> None:
    # an interrupted caller may never have been handed the tuner, which the hooks on the model keep alive
    for found in gc.get_objects():
        if type(found) is PCGrowModel and found.__dict__.get("_modules", {}).get("model") is model:
            found.unload()


def at_rest(model: nn.Module, training: bool) -> nn.Module:
    """Nothing trains of a model with adapters, and all of it is in one mode."""
    if isinstance(model, PeftModel):
        model.requires_grad_(False)
        model.train(training)
    return model
