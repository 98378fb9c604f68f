"""Load what a run of `grow` left, from its folder or from the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME as CONFIG
from torch import nn

from peft_pcgrow.adapter.model import PCGrowModel
from peft_pcgrow.adapter.model_card import adapters_in, folder_of
from peft_pcgrow.hub_access import fetched, is_on_hub
from peft_pcgrow.rounds.as_it_was import adapters_of, or_none

# names of the adapters of a run
ROUNDS = re.compile(r"default|round-\d+")


def load_grown(
    model: nn.Module, folder: str | Path, names: Sequence[str] | None = None, *, revision: str | None = None
) -> nn.Module:
    """A base with the adapters that a run of `grow` left, all active, none of which trains.

    One adapter is also loaded by `PeftModel.from_pretrained(model, folder)`; those of later rounds grow from earlier
    ones, and need these beside them.

    Args:
        model: the base, without adapters, or with those of the run that this one went on from.
        folder: `adapter` of a run, or a repository of the Hub that it was pushed to, such as "me/olmoe-medicine".
        names: those of some rounds, the first that was grown first; None: all.
        revision: of the repository: a branch, a tag, or a commit's hash.

    Raises:
        FileNotFoundError: no adapter in the folder, or not that one, or no such repository. TypeError: a model with
            other adapters. ValueError: names=[], an adapter that the model has already, or revision= of a folder.
            PermissionError, ConnectionError: the Hub does not show it, or is not reached.

    Example:
        >>> import copy
        >>> base = copy.deepcopy(model)
        >>> options = {"heldout": batches[1], "rounds": 1, "max_steps": 4, "lr": 0.1}
        >>> result = grow(model, batches[0], output_dir=folder / "run", length=24, progress=False, **options)
        >>> list(load_grown(base, folder / "run" / "adapter").peft_config)
        ['default']
    """
    check_grown(model)
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    root = Path(folder)
    if not root.exists() and is_on_hub(str(folder)):
        root = fetched(str(folder), revision)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository of the Hub, and {folder} is a path: leave it out")
    found = rounds_in(root)
    if names is None and not found:
        raise FileNotFoundError(f"{root} has no {CONFIG}: give the folder adapter of a run of grow, or owner/name")
    places = {name: folder_of(root, name) for name in (found if names is None else names)}
    if not places:
        raise ValueError("names=[] names no adapter: give some, or None for all")
    for name, place in places.items():
        if not (place / CONFIG).is_file():
            raise FileNotFoundError(f"{place} has no {CONFIG}, so there is no adapter {name!r}: give those of the run")
    if again := [name for name in places if name in adapters_of(model)]:
        raise ValueError(f"the model has an adapter {again[0]!r} already: give the base that these were grown on")
    with or_none(model):
        for name, place in places.items():
            if not isinstance(model, PeftModel):
                model = PeftModel.from_pretrained(model, str(place), adapter_name=name)  # type: ignore[arg-type]
            else:
                model.load_adapter(str(place), adapter_name=name)  # type: ignore[operator]
            # one after the other: each is asked for the rows of those before it
            active = [name, *active]
        if len(active) > 1:
            model.base_model.set_adapter(active)  # type: ignore[operator,union-attr]
    return model.requires_grad_(False)


def rounds_in(root: Path) -> dict[str, Path]:
    """Folders of the adapters of a run's rounds, by name, in their order."""
    return {name: place for name, place in adapters_in(root).items() if ROUNDS.fullmatch(name)}


def check_grown(model: nn.Module) -> None:
    """TypeError if a model has adapters that are no run's."""
    names = adapters_of(model)
    ours = isinstance(getattr(model, "base_model", None), PCGrowModel)
    if names and not (ours and all(ROUNDS.fullmatch(name) for name in names)):
        raise TypeError(
            f"the model has adapters {', '.join(map(repr, names))} that no run of grow made: give the base, or "
            'load_grown(base, "RUN/adapter") to go on from a run'
        )
