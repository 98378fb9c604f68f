"""Skip: take out decoder layers that have become the identity on some text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow import experts
from peft_pcgrow.compress.calibrate import Calibration


def skip_damage(calibration: Calibration, layer: int) -> Tensor:
    """Change of the loss if one layer's update were left out, by text, nats per token: first order, and second order
    by the empirical Fisher matrix."""
    sample, found = calibration.layers[layer], torch.zeros(len(calibration.names), dtype=torch.float64, device="cpu")
    change = sample.skipped.double()
    found.index_add_(0, sample.text, change + change.square() / 2)
    return found / torch.tensor(calibration.labels, dtype=torch.float64, device="cpu")


def drop_layers(model: Any, dropped: Sequence[int]) -> Callable[[], None]:
    """Take decoder layers out of a model and its config, in place; what is returned puts them back.

    Raises:
        ValueError: all layers are to go, or the config of this architecture has no room for what would be left.
    """
    layers = _layer_list(model)
    config = experts.text_config(model.config)
    before = list(layers)
    left = [i for i in range(len(before)) if i not in set(dropped)]
    if not left:
        raise ValueError(f"skipping all {len(before)} layers leaves no model")
    values = {name: getattr(config, name) for name in vars(config) if name in ("num_hidden_layers", "layer_types")}
    modules: list[Any] = [module for layer in before for module in layer.modules() if hasattr(module, "layer_idx")]
    places = [(module, module.layer_idx) for module in modules]

    def undo() -> None:
        _fill(layers, before)
        for name, value in values.items():
            setattr(config, name, value)
        for module, index in places:
            module.layer_idx = index

    new = {old: place for place, old in enumerate(left)}
    try:
        _fill(layers, [before[i] for i in left])
        for module, index in places:
            module.layer_idx = new.get(index, index)
        # the types first: configs check that there are as many as layers
        if values.get("layer_types") is not None:
            config.layer_types = [values["layer_types"][i] for i in left]
        config.num_hidden_layers = len(left)
        with torch.device("meta"):
            like = type(model)(model.config)
        shapes = {name: p.shape for name, p in model.state_dict().items()}
        if shapes != {name: p.shape for name, p in like.state_dict().items()}:
            raise ValueError("its layers differ by their place")
    except BaseException as error:
        undo()
        if not isinstance(error, Exception):
            raise
        raise ValueError(
            f"layers of {type(model).__name__} cannot be skipped: its config does not describe what would be left "
            f"({error}); plan without the method 'skip'"
        ) from error
    return undo


def can_skip(model: nn.Module) -> bool:
    """Whether `drop_layers` works on this architecture; tried on the layer in the middle, which is put back."""
    layers = len(experts.find_experts(model).layers)
    try:
        drop_layers(model, [layers // 2])()
    except ValueError:
        return False
    return layers > 1


def _layer_list(model: nn.Module) -> nn.ModuleList:
    wanted = experts.find_experts(model).layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and tuple(m) == wanted)


def _fill(layers: nn.ModuleList, contents: Sequence[nn.Module]) -> None:
    while len(layers):
        del layers[len(layers) - 1]
    layers.extend(contents)
