"""Skip: take out decoder layers that have become the identity on some text."""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import find_experts
from peft_pcgrow.atomic import all_or_nothing, completed
from peft_pcgrow.compress.calibrate import Calibration

# attributes that number a module's layer
PLACES = ("layer_idx", "layer_id")
# of a config, not written into its file
UNWRITTEN = ("_attn_implementation", "_experts_implementation")
# how fields of a config end that list tokens, not layers
TOKENS = ("token_id", "token_ids")
# tokens of a text that a model and one made of its config are compared on
TRIED = 32


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
    lists = _by_layer(config, len(before))
    count = config.num_hidden_layers
    places = _places(before)

    def undo() -> None:
        _fill(layers, before)
        _describe(config, lists, count)
        for module, name, index in places:
            setattr(module, name, index)

    return undo


def _places(layers: Sequence[nn.Module]) -> list[tuple[nn.Module, str, int]]:
    """What modules of these layers say of their place: module, attribute, number."""
    every = ((module, name) for layer in layers for module in layer.modules() for name in PLACES)
    return [(module, name, getattr(module, name)) for module, name in every if hasattr(module, name)]


def drop_layers(model: Any, dropped: Sequence[int]) -> None:
    """Take decoder layers out of a model and its config, in place (see `layers_in_use`); or leave all as it is.

    Raises:
        ValueError: all layers are to go, or the config of this architecture cannot describe what would be left: a model
            made of it would have other weights or, where all weights lie on one device, compute something else.
    """
    _drop(model, dropped, _is_as_told(model))


def _drop(model: Any, dropped: Sequence[int], told: bool) -> None:
    """As `drop_layers`; `told`: whether the model computes what one made of its config does."""
    layers = _layer_list(model)
    config = experts.text_config(model.config)
    before = list(layers)
    left = [i for i in range(len(before)) if i not in set(dropped)]
    if not left:
        raise ValueError(f"skipping all {len(before)} layers leaves no model")
    lists = {name: type(each)(each[i] for i in left) for name, each in _by_layer(config, len(before)).items()}
    new = {old: place for place, old in enumerate(left)}
    try:
        with all_or_nothing() as undo:
            undo.append(layers_in_use(model))
            if config.num_hidden_layers != len(before):
                raise ValueError(f"it counts {config.num_hidden_layers} layers where there are {len(before)}")
            for module, name, index in _places(before):
                setattr(module, name, new.get(index, index))
            _fill(layers, [before[i] for i in left])
            _describe(config, lists, len(left))
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                like = type(model)(_reread(model.config))
            shapes = {name: p.shape for name, p in model.state_dict().items()}
            if shapes != {name: p.shape for name, p in like.state_dict().items()}:
                raise ValueError("its layers differ by their place")
            if told and not _is_as_told(model):
                raise ValueError("its layers compute by their place")
    except Exception as error:
        raise ValueError(
            f"layers of {type(model).__name__} cannot be skipped: its config does not describe what would be left "
            f"({error}); plan without the method 'skip'"
        ) from error


def layers_to_skip(model: nn.Module) -> list[int]:
    """The decoder layers that `drop_layers` can take out of this model, each alone; it is left as it was."""
    told, found = _is_as_told(model), list[int]()
    for layer in range(len(find_experts(model).layers)):
        back = layers_in_use(model)
        try:
            _drop(model, [layer], told)
            found.append(layer)
        except ValueError:
            pass
        finally:
            completed(back)
    if found and not told:
        warnings.warn(
            f"whether {type(model).__name__} with layers skipped will compute the same once it is loaded again cannot "
            "be tried: it lies on several devices, or is not what its config says. Compare it after loading",
            stacklevel=2,
        )
    return found


def _by_layer(config: Any, count: int) -> dict[str, Any]:
    """What a config says of each of `count` decoder layers: lists as long, unless they name layers or tokens."""
    lists = {
        name: each for name, each in vars(config).items() if isinstance(each, (list, tuple)) and len(each) == count
    }
    rising = {name for name, each in lists.items() if all(type(x) is int for x in each) and _rises(each)}
    return {name: each for name, each in lists.items() if name not in rising and not name.endswith(TOKENS)}


def _rises(each: Sequence[int]) -> bool:
    return all(first < second for first, second in pairwise(each))


def _describe(config: Any, lists: dict[str, Any], count: int) -> None:
    # not by attribute: configs check that there are as many types as layers, each time one of them is set
    vars(config).update(lists)
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if name in vars(config):
        vars(config)[name] = count


def _reread(config: Any) -> Any:
    """A config as it is read from its file; what is not written there, how attention and experts run, is taken over."""
    again = type(config).from_dict(config.to_dict())
    for name in UNWRITTEN:
        if getattr(config, name, None) is not None:
            setattr(again, name, getattr(config, name))
    return again


@torch.no_grad()
def _is_as_told(model: Any) -> bool:
    """Whether a model made of the config, with these weights, computes the same bits; False where that cannot be tried:
    weights on several devices, or a text model that wants more than tokens."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        return False
    modes = {module: module.training for module in model.modules()}
    try:
        # constructors draw, and may be told another device
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), init_empty_weights(include_buffers=False):
            like = type(model)(_reread(model.config))
        like.load_state_dict(model.state_dict(), assign=True)
        device = devices.pop()
        buffers = dict(model.named_buffers())
        for path, buffer in list(like.named_buffers()):
            module, _, name = path.rpartition(".")
            # in the dtype that the model was cast to, by from_pretrained or by hand
            like.get_submodule(module)._buffers[name] = buffer.to(device, buffers[path].dtype)
        ids = (torch.arange(1, TRIED, device=device) % model.config.get_text_config().vocab_size).unsqueeze(0)
        # without the hooks of the whole model: this is no run of the user's; with a cache, which goes by places
        logits = [each.eval().forward(input_ids=ids, use_cache=True).logits for each in (model, like)]
        return torch.equal(*logits)
    except Exception:
        return False
    finally:
        for module, training in modes.items():
            module.training = training


def _layer_list(model: nn.Module) -> nn.ModuleList:
    wanted = find_experts(model).layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and tuple(m) == wanted)


def _fill(layers: nn.ModuleList, contents: Sequence[nn.Module]) -> None:
    while len(layers):
        del layers[len(layers) - 1]
    layers.extend(contents)
