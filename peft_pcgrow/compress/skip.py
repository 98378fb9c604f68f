"""Skip: take out decoder layers that have become the identity on some text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import find_experts
from peft_pcgrow.atomic import all_or_nothing, completed
from peft_pcgrow.compress.calibrate import Calibration


def skip_damage(calibration: Calibration, layer: int) -> Tensor:
    """Change of the loss if one layer's update were left out, by text, nats per token: first order, and second order
    by the empirical Fisher matrix."""
    sample, found = calibration.layers[layer], torch.zeros(len(calibration.names), dtype=torch.float64, device="cpu")
    change = sample.skipped.double()
    found.index_add_(0, sample.text, change + change.square() / 2)
    return found / torch.tensor(calibration.labels, dtype=torch.float64, device="cpu")


def layers_in_use(model: Any) -> Callable[[], None]:
    """What puts back the decoder layers that a model has now, and what its config says of them."""
    layers = _layer_list(model)
    config = experts.text_config(model.config)
    before = list(layers)
    values = {name: getattr(config, name) for name in vars(config) if name in ("num_hidden_layers", "layer_types")}
    modules: list[Any] = [module for layer in before for module in layer.modules() if hasattr(module, "layer_idx")]
    places = [(module, module.layer_idx) for module in modules]

    def undo() -> None:
        _fill(layers, before)
        for name, value in values.items():
            setattr(config, name, value)
        for module, index in places:
            module.layer_idx = index

    return undo


def drop_layers(model: Any, dropped: Sequence[int]) -> None:
    """Take decoder layers out of a model and its config, in place (see `layers_in_use`); or leave all as it is.

    Raises:
        ValueError: all layers are to go, or the config of this architecture has no room for what would be left.
    """
    layers = _layer_list(model)
    config = experts.text_config(model.config)
    before = list(layers)
    left = [i for i in range(len(before)) if i not in set(dropped)]
    if not left:
        raise ValueError(f"skipping all {len(before)} layers leaves no model")
    types = vars(config).get("layer_types")
    new = {old: place for place, old in enumerate(left)}
    try:
        with all_or_nothing() as undo:
            undo.append(layers_in_use(model))
            for module in (module for layer in before for module in layer.modules() if hasattr(module, "layer_idx")):
                module.layer_idx = new.get(module.layer_idx, module.layer_idx)  # type: ignore
            _fill(layers, [before[i] for i in left])
            # the types first: configs check that there are as many as layers
            if types is not None:
                config.layer_types = [types[i] for i in left]
            config.num_hidden_layers = len(left)
            with torch.device("meta"):
                like = type(model)(model.config)
            shapes = {name: p.shape for name, p in model.state_dict().items()}
            if shapes != {name: p.shape for name, p in like.state_dict().items()}:
                raise ValueError("its layers differ by their place")
    except Exception as error:
        raise ValueError(
            f"layers of {type(model).__name__} cannot be skipped: its config does not describe what would be left "
            f"({error}); plan without the method 'skip'"
        ) from error


def can_skip(model: nn.Module) -> bool:
    """Whether `drop_layers` works on this architecture; tried on the layer in the middle, which is put back."""
    layers = len(find_experts(model).layers)
    back = layers_in_use(model)
    try:
        drop_layers(model, [layers // 2])
    except ValueError:
        return False
    finally:
        completed(back)
    return layers > 1


def _layer_list(model: nn.Module) -> nn.ModuleList:
    wanted = find_experts(model).layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and tuple(m) == wanted)


def _fill(layers: nn.ModuleList, contents: Sequence[nn.Module]) -> None:
    while len(layers):
        del layers[len(layers) - 1]
    layers.extend(contents)
