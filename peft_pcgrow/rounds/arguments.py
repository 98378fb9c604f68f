"""Arguments of `grow`: what each may be, and what only the loop sets."""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from numbers import Real
from typing import Any

from transformers import TrainingArguments

from peft_pcgrow.adapter.config import PCGrowConfig, check_rate
from peft_pcgrow.locate.budget import check_budget
from peft_pcgrow.maps.corpus import whole_number

# fields of PCGrowConfig that the loop decides, and the argument of grow that they follow from
DECIDED = {
    "error_map": "", "budget": "budget", "locus": "", "parts": "", "grow": "", "gate_fpr": "gate_fpr", "spawned": "",
    "resolution": "", "router": "", "select": "", "inference_mode": "", "init_weights": "", "target_modules": "",
    "exclude_modules": "", "layers_pattern": "",
}  # fmt: skip
# TrainingArguments that the loop sets, or that would be ignored, or that an interrupted run could not go on with
OURS = {
    "output_dir": "output_dir", "max_steps": "max_steps", "num_train_epochs": "epochs", "seed": "seed",
    "per_device_train_batch_size": "batch_size", "per_device_eval_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size", "gradient_accumulation_steps": "batch_size",
    **dict.fromkeys(
        ("learning_rate", "optim", "optim_args", "optim_target_modules", "lr_scheduler_type", "lr_scheduler_kwargs",
         "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), "lr",
    ),
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps",
         "save_total_limit", "save_only_model", "prediction_loss_only", "load_best_model_at_end",
         "metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "ignore_data_skip",
         "restore_callback_states_from_checkpoint", "label_smoothing_factor", "dataloader_drop_last"), "",
    ),
}  # fmt: skip


def check_arguments(given: Mapping[str, Any]) -> None:
    """Check those of `grow`'s arguments that are given, by their names, without a model or text.

    Raises:
        TypeError: an option that grow decides itself, or that there is not.
        ValueError: a value that is none, or out of its range. Both name the argument.
    """
    for name, check in CHECKS.items():
        if name in given:
            check(name, given[name])


def plain_form(value: Any) -> Any:
    """A value as JSON holds it, the same in every process: sets in order, objects that hold no settings by their
    class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Mapping):
        return {str(key): plain_form(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_form(held) for held in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain_form(held) for held in value), key=lambda held: json.dumps(held, sort_keys=True))
    if isinstance(value, Enum):
        return plain_form(value.value)
    kind = type(value)
    if kind.__module__ == "torch" or hasattr(value, "__fspath__"):  # such as torch.bfloat16
        return str(value)
    for step in ("to_dict", "tolist"):
        if not isinstance(value, type) and hasattr(value, step):
            return plain_form(getattr(value, step)())
    if not isinstance(value, type) and hasattr(value, "__dataclass_fields__"):
        return {each.name: plain_form(getattr(value, each.name)) for each in fields(value)}
    kind = value if isinstance(value, type) else kind
    return f"{kind.__module__}.{kind.__qualname__}"


def _finite(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} is a text: give a number")
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """ValueError, with the name, unless a value is a finite number above 0."""
    _finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")


def _or_none(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def _whole(unit: str, least: int = 1, most: int | None = None) -> Callable[[str, Any], None]:
    def checked(name: str, value: Any) -> None:
        if whole_number(name, value, unit, least) > (value if most is None else most):
            raise ValueError(f"{name} must be at most {most}, got {value!r}")

    return checked


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def _config(name: str, value: Any) -> None:
    _options(name, value, PCGrowConfig, DECIDED)
    try:
        PCGrowConfig(**value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _trainer(name: str, value: Any) -> None:
    _options(name, value, TrainingArguments, OURS)
    try:
        TrainingArguments(output_dir="nothing is written", **value)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{name}: {error}") from None


def _options(name: str, given: Any, kind: Any, ours: Mapping[str, str]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a mapping of {kind.__name__}'s names to values, got {given!r}")
    if refused := [key for key in given if key in ours]:
        instead = sorted({ours[key] for key in refused} - {""})
        hint = f"give {', '.join(f'{each}=' for each in instead)} to grow instead" if instead else "leave it out"
        raise TypeError(f"{name} sets {', '.join(refused)}, which grow decides itself: {hint}")
    known = [each.name for each in fields(kind) if each.init and each.name not in ours]
    if unknown := [str(key) for key in given if key not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"{kind.__name__} has {', '.join(sorted(known))}"
        raise TypeError(f"{name} has no field {', '.join(unknown)}: {hint}")


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "budget": lambda _, value: check_budget(value),
    "gate_fpr": lambda _, value: check_rate(value),
    "rounds": _whole("rounds"),
    "length": _whole("tokens"),
    "batch_size": _whole("windows"),
    # on fewer no gates can be fitted
    "map_windows": _whole("windows", 4),
    "epochs": check_positive,
    "max_steps": _or_none(_whole("steps")),
    "lr": _or_none(check_positive),
    "max_forgetting": _or_none(_finite),
    # what numpy takes
    "seed": _whole("a seed", 0, 2**32 - 1),
    "curriculum": _flag,
    "map_after": _flag,
    "progress": _flag,
    "config": _or_none(_config),
    "trainer": _or_none(_trainer),
}
