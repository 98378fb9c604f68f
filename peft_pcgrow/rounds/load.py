"""Load what a run of `grow` left, from its folder or from the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME as CONFIG
from torch import nn

from peft_pcgrow.adapter.model_card import adapters_in
from peft_pcgrow.hub_access import fetched, is_on_hub


def load_grown(
    model: nn.Module, folder: str | Path, names: Sequence[str] | None = None, *, revision: str | None = None
) -> nn.Module:
    """A base with the adapters that a run of `grow` left, all active, none of which trains.

    One adapter is also loaded by `PeftModel.from_pretrained(model, folder)`; those of later rounds grow from earlier
    ones, and need these beside them.

    Args:
        model: the base, without adapters.
        folder: `adapter` of a run, or a repository of the Hub that it was pushed to, such as "me/olmoe-medicine".
        names: those of some rounds, the first that was grown first; None: all.
        revision: of the repository: a branch, a tag, or a commit's hash.

    Raises:
        FileNotFoundError: no adapter in the folder, or not that one, or no such repository. TypeError: a model with
            adapters. ValueError: names=[], or revision= of a folder. PermissionError, ConnectionError: the Hub does not
            show it, or is not reached.

    Example:
        >>> import copy
        >>> base = copy.deepcopy(model)
        >>> options = {"heldout": batches[1], "retain": retain, "rounds": 1, "max_steps": 4, "lr": 0.1}
        >>> result = grow(model, batches[0], output_dir=folder / "run", length=24, progress=False, **options)
        >>> list(load_grown(base, folder / "run" / "adapter").peft_config)
        ['default']
    """
    if hasattr(model, "peft_config"):
        raise TypeError("the model has adapters already: give the base that they were grown on")
    root = Path(folder)
    if not root.exists() and is_on_hub(str(folder)):
        root = fetched(str(folder), revision)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository of the Hub, and {folder} is a path: leave it out")
    found = rounds_in(root)
    if names is None and not found:
        raise FileNotFoundError(f"{root} has no {CONFIG}: give the folder adapter of a run of grow, or owner/name")
    places = {name: root if name == "default" else root / name for name in (found if names is None else names)}
    if not places:
        raise ValueError("names=[] names no adapter: give some, or None for all")
    for name, place in places.items():
        if not (place / CONFIG).is_file():
            raise FileNotFoundError(f"{place} has no {CONFIG}, so there is no adapter {name!r}: give those of the run")
    for number, (name, place) in enumerate(places.items()):
        if number == 0:
            model = PeftModel.from_pretrained(model, str(place), adapter_name=name)  # type: ignore[arg-type]
        else:
            model.load_adapter(str(place), adapter_name=name)  # type: ignore[operator]
    if len(places) > 1:
        model.base_model.set_adapter(list(places)[::-1])  # type: ignore[operator,union-attr]
    return model.requires_grad_(False)


def rounds_in(root: Path) -> dict[str, Path]:
    """Folders of the adapters of a run's rounds, by name, in their order."""
    return {n: place for n, place in adapters_in(root).items() if n == "default" or re.fullmatch(r"round-\d+", n)}
