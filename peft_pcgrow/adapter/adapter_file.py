"""An adapter's state dict on its way to a file and back: closed with seals, and compared with them."""

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from peft_pcgrow.adapter import seal
from peft_pcgrow.adapter.host import AuxiliaryTrainingWrapper, BaseTunerLayer
from peft_pcgrow.adapter.layer import PCGrowExperts
from peft_pcgrow.adapter.seal import KEY, SEAL_MARK, Seal
from peft_pcgrow.adapter.sealed_layer import came
from peft_pcgrow.architectures.sharded import whole
from peft_pcgrow.settling.host import WRAPPED

# modules that wrap others and leave no trace in a state dict
_WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPED)})\.")
# the checksum of a bank, before there were seals
_OLD = ".pcgrow_checksum"
Rename = Callable[[str, str], str]


class Closing(dict):
    """An adapter's tensors, in which `items` first gathers what is sharded and closes the seals: PEFT adds what is
    beside the layers, then asks for the items once, to write them."""

    def __init__(self, tensors: Mapping[str, Tensor], model: nn.Module, adapter: str, rename: Rename):
        super().__init__(tensors)
        self.model, self.adapter, self.rename = model, adapter, rename

    def items(self) -> ItemsView:
        layers = {tail(name): layer for name, layer in grown_layers(self.model, self.adapter).items()}
        tensors, names, others = {}, {}, {}
        for given, tensor in list(super().items()):
            key = self.rename(given, self.adapter)
            name, inside, rest = key.partition(".pcgrow_")
            layer = layers.get(tail(name)) if inside else None
            self[given] = tensor = whole(tensor) if layer is None else layer.collected(self.adapter, rest, tensor)
            if layer is None:
                others[tail(key)] = tensor
            elif not rest.endswith(KEY):
                names[layer.layer_index] = name
                tensors.setdefault(layer.layer_index, {})[f"pcgrow_{rest}"] = tensor
        facts = {layer.layer_index: layer.facts(self.adapter) for layer in layers.values()}
        if not any(tensor.is_meta for tensor in self.values()):
            for index, closed in seal.close(tensors, facts, others).items():
                self[seal_key(names[index], self.adapter)] = closed.write()
        return super().items()


def check_file(model: nn.Module, adapter: str, verify: bool, tensors: Mapping[str, Tensor], rename: Rename) -> dict:
    """What a model takes from an adapter's file, by the model's own keys.

    Args:
        tensors: those of the file, by the model's own keys as far as it has them.

    Raises:
        ValueError: the file is for another adapter or base, is not whole, was altered, or holds tensors of the base.
    """
    layers = grown_layers(model, adapter)
    facts = {layer.layer_index: layer.facts(adapter) for layer in layers.values()}
    seals = {key: Seal.read(value) for key, value in tensors.items() if f".{SEAL_MARK}." in key} if verify else {}
    if verify:
        if not seals or any(each.tensors is None for each in seals.values()):
            raise ValueError(seal.unsealed(f"what is loaded into adapter {adapter!r}"))
        seal.check_facts([each.facts for each in seals.values()], facts.values(), adapter)
    noted = {each.facts["layer"]: each.tensors or {} for each in seals.values()}
    beside = {key: t for key, t in tensors.items() if not (f".{SEAL_MARK}." in key or key.endswith(_OLD))}
    for name, layer in layers.items():
        held = {key: beside.pop(key) for key in list(beside) if key.startswith(f"{name}.pcgrow_")}
        held = {rename(key, adapter).removeprefix(f"{name}."): tensor for key, tensor in held.items()}
        where = f"layer {layer.layer_index} of adapter {adapter!r}"
        if missing := sorted(layer.own_tensors(adapter).keys() - held.keys()):
            raise ValueError(f"{where}: {', '.join(missing)} is missing from the adapter's file: {seal.OPEN}")
        if verify:
            seal.check_contents(where, noted[layer.layer_index], held)
    _refuse_base_tensors(model, beside)
    if verify:
        saved = _saved_keys(model, adapter)
        found = {tail(saved.get(key) or rename(key, adapter)): tensor for key, tensor in beside.items()}
        seal.check_contents(f"beside the layers of adapter {adapter!r}", seal.check_whole(seals.values()), found)
    taken = {key: tensor for key, tensor in tensors.items() if not (f".{SEAL_MARK}." in key or key.endswith(_OLD))}
    # checked, so the receiver's own, which torch's loading compares again
    return taken | {seal_key(name, adapter): Seal(facts[layer.layer_index]).write() for name, layer in layers.items()}


def dealt(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Banks of a file, by the model's own keys, as they are to lie where processes share out the experts."""
    found = {}
    for name, layer in grown_layers(model, adapter).items():
        keys = [f"{name}.{own_key(f'{stack}.weight', adapter)}" for stack in layer.adapter_layer_names]
        for key in keys if layer.share is not None else ():
            found[key] = layer.dealt(adapter, tensors[key])
    return found


def check_state(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raise ValueError if a state dict has banks for other adapters than the model's, or does not say whose they are;
    before any tensor is written."""
    for name, layer in _layers(model):
        for adapter, holder in layer.pcgrow_seal.items():
            if not holder.verify:
                continue
            found = state.get(f"{prefix}{seal_key(name, adapter)}")
            here = {f"{prefix}{name}.{own_key(key, adapter)}": key for key in layer.own_tensors(adapter)}
            if found is None and (given := next((own for own in here if own in state), None)) is not None:
                raise ValueError(
                    f"{seal.unsealed(f'the state dict with {given}')}. Parameters that train are not enough: keep all "
                    "entries whose names contain 'pcgrow', as state_dict(), get_peft_model_state_dict(model) and "
                    "save_pretrained() do"
                )
            if found is not None:
                theirs = Seal.read(found)
                seal.check_facts([theirs.facts], [layer.facts(adapter)], adapter)
                if theirs.tensors is not None:
                    given = {key: state[own] for own, key in here.items() if own in state}
                    seal.check_contents(f"layer {layer.layer_index} of adapter {adapter!r}", theirs.tensors, given)


def check_loaded(model: nn.Module, before: Mapping[str, int], rename: Rename) -> None:
    """Compare what transformers' own loader has put into a model with the seals that came with it.

    Args:
        before: ids of the base's parameters when the adapters were made, as far as they are known.

    Raises:
        ValueError: as `check_file`.
    """
    seals: dict[str, list[Seal]] = {}
    for _, layer in _layers(model):
        layer.check_loaded()
        for adapter, holder in layer.pcgrow_seal.items():
            if holder.expected is not None:
                seals.setdefault(adapter, []).append(holder.expected)  # type: ignore
    if seals:
        present = {_WRAPPERS.sub("", name): parameter for name, parameter in model.named_parameters()}
        now = dict(base_parameters(model))
        _refuse_base_tensors(model, [n for n in before if n in now and id(now[n]) != before[n] and came(now[n])])
        for adapter, found in seals.items():
            grown = {layer.layer_index for layer in grown_layers(model, adapter).values()}
            if missing := sorted(grown - {each.facts["layer"] for each in found}):
                raise ValueError(seal.incomplete(adapter, missing))
            saved, inside = _saved_keys(model, adapter), tuple(f"{name}.pcgrow_" for name, _ in _layers(model))
            beside = {
                tail(saved.get(own) or rename(own, adapter)): tensor
                for own, tensor in present.items()
                if own not in now and adapter in own.split(".") and not own.startswith(inside)
            }
            # PEFT may have added embeddings, which are the base's
            noted = {key: value for key, value in seal.check_whole(found).items() if key in beside}
            seal.check_contents(f"beside the layers of adapter {adapter!r}", noted, beside, exact=False)
        for _, layer in _layers(model):
            for holder in layer.pcgrow_seal.values():
                holder.expected = None  # type: ignore


def grown_layers(model: nn.Module, adapter: str) -> dict[str, PCGrowExperts]:
    """The layers that an adapter grows, by their names in a state dict."""
    return {name: layer for name, layer in _layers(model) if adapter in layer.births}


def seal_key(name: str, adapter: str) -> str:
    return f"{name}.{SEAL_MARK}.{adapter}.{KEY}"


def own_key(key: str, adapter: str) -> str:
    """A tensor's key after its layer's name, with the adapter's name in it."""
    container, _, rest = key.partition(".")
    return ".".join([container, adapter, *([rest] if rest else [])])


def tail(key: str) -> str:
    """A key from its first number on: architectures are renamed above their layers."""
    parts = key.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[max(first, 0) :])


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that belong to no adapter, by their names in a state dict."""
    owners = _owners(model)
    for name, parameter in model.named_parameters():
        if _is_base(name, owners):
            yield _WRAPPERS.sub("", name), parameter


def _layers(model: nn.Module) -> Iterator[tuple[str, PCGrowExperts]]:
    for name, module in model.named_modules():
        if isinstance(module, PCGrowExperts):
            yield _WRAPPERS.sub("", name), module


def _owners(model: nn.Module) -> dict[str, str]:
    """Modules that hold both an adapter's tensors and the base's, and where they keep the latter."""
    kinds = {BaseTunerLayer: "base_layer", AuxiliaryTrainingWrapper: "original_module"}
    found = {}
    for name, module in model.named_modules():
        for kind, inside in kinds.items():
            if isinstance(module, kind):
                found[name] = inside
    return found


def _is_base(key: str, owners: Mapping[str, str]) -> bool:
    above = key
    while "." in above:
        above = above.rpartition(".")[0]
        if above in owners:
            return key.removeprefix(f"{above}.").startswith(f"{owners[above]}.")
    return True


def _refuse_base_tensors(model: nn.Module, tensors: Iterable[str]) -> None:
    """An adapter's file may hold the embeddings of a vocabulary that was resized (PEFT adds them), and else nothing of
    the base."""
    owners = {_WRAPPERS.sub("", name): inside for name, inside in _owners(model).items()}
    known = {_WRAPPERS.sub("", name) for name, _ in (*model.named_parameters(), *model.named_buffers())}
    words = [get() for name in ("get_input_embeddings", "get_output_embeddings") if (get := getattr(model, name, None))]
    names = [_WRAPPERS.sub("", name) for name, module in model.named_modules() if any(module is word for word in words)]
    for key in tensors:
        if key not in known:
            raise ValueError(f"the adapter's file holds {key}, which this model has no place for: {seal.OPEN}")
        if _is_base(key, owners) and not any(key.startswith(f"{name}.") for name in names):
            raise ValueError(f"the adapter's file holds {key}, which would overwrite a weight of the base: {seal.OPEN}")


def _saved_keys(model: nn.Module, adapter: str) -> dict[str, str]:
    """How the tensors of `modules_to_save` and trainable tokens are called in a file, by the model's own keys."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = _WRAPPERS.sub("", name)
            loaded = module.adapter_state_dict_load_map(adapter)
            found |= {f"{name}.{own}": f"{name}.{saved}" for saved, own in loaded.items()}
    return found
