"""Seals: what an adapter's tensors are for, and what they were, carried among the tensors themselves.

Every layer of an adapter has one, bytes in the state dict that no loader leaves out: the sha256 of a JSON text, and
that text. It says what the layer's bank is (`facts`) and, once saved, what every tensor of the layer was. The lowest
layer's also lists the tensors outside of layers (`modules_to_save`); all hold one digest of everything together.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_pcgrow.architectures.same_base import difference
from peft_pcgrow.settling.host import EXTRA_STATE

SEAL_MARK, KEY = "pcgrow_seal", EXTRA_STATE
OPEN = "this file was altered or mixed up with another; copy it again from where it was saved"
# facts that every seal has
NAMED = {"layer", "locus", "spawned", "base"}
# a tensor as it was: its dtype, and the hash of its shape and values
Contents = Mapping[str, list[str]]


@dataclass(frozen=True)
class Seal:
    """What one layer's seal says; `tensors` is None in a state dict that was not saved as an adapter."""

    facts: Mapping[str, Any]
    tensors: Contents | None = None
    others: Contents | None = None
    whole: str | None = None

    def write(self) -> Tensor:
        """As bytes, `[N]` uint8."""
        text = _text(vars(self))
        return torch.frombuffer(bytearray(hashlib.sha256(text).digest() + text), dtype=torch.uint8)

    @classmethod
    def read(cls, data: Any) -> "Seal":
        """Raises ValueError if the bytes are not as they were written, or by another version."""
        blob = data.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if isinstance(data, Tensor) else b""
        if hashlib.sha256(blob[32:]).digest() != blob[:32]:
            raise ValueError(f"the seal of an adapter's layer is damaged: {OPEN}")
        noted = json.loads(blob[32:])
        if noted.keys() != cls.__dataclass_fields__.keys() or not noted["facts"].keys() >= NAMED:
            raise ValueError(
                "the seal of an adapter's layer says what this version does not know: load it with a newer"
            )
        return cls(**noted)


def close(
    tensors: Mapping[int, Mapping[str, Tensor]], facts: Mapping[int, Mapping[str, Any]], others: Mapping[str, Tensor]
) -> dict[int, Seal]:
    """Seals of all layers of an adapter, from their tensors by name and what belongs to none of them."""
    found = {layer: Seal(facts[layer], contents(held)) for layer, held in tensors.items()}
    beside = contents(others)
    whole = _whole(found.values(), beside)
    return {
        layer: Seal(seal.facts, seal.tensors, beside if layer == min(found) else None, whole)
        for layer, seal in found.items()
    }


def check_whole(seals: Iterable[Seal]) -> Contents:
    """The tensors outside of layers that these seals list; raises ValueError unless they were closed together."""
    seals = list(seals)
    others = next((seal.others for seal in seals if seal.others is not None), {})
    if {seal.whole for seal in seals} != {_whole(seals, others)}:
        raise ValueError(f"layers of this adapter's file do not belong together: {OPEN}")
    return others


def check_contents(where: str, noted: Contents, found: Mapping[str, Tensor], exact: bool = True) -> None:
    """Raise ValueError unless these are the tensors that a seal lists.

    Args:
        exact: False passes tensors that were loaded into a dtype that cannot hold what they were.
    """
    if missing := sorted(noted.keys() - found.keys()):
        raise ValueError(f"{where}: {', '.join(missing)} is missing from the adapter's file: {OPEN}")
    if more := sorted(found.keys() - noted.keys()):
        raise ValueError(f"{where}: {', '.join(more)} was not saved with this adapter: {OPEN}")
    for name, tensor in found.items():
        dtype, hashed = noted[name]
        held = getattr(torch, dtype)
        if not exact and tensor.dtype != held and torch.promote_types(tensor.dtype, held) != tensor.dtype:
            continue
        if digest(tensor) != hashed:
            raise ValueError(f"{where}: {name} does not have the checksum saved beside it: {OPEN}")


def contents(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    return {name: [str(t.dtype).removeprefix("torch."), digest(t)] for name, t in sorted(tensors.items())}


def digest_all(tensors: Mapping[str, Tensor]) -> str:
    """One digest of all of them, with their names."""
    return hashlib.sha256(_text(contents(tensors))).hexdigest()


def digest(tensor: Tensor) -> str:
    """Of shape and values; of fp32, so that what was saved in half precision hashes alike when it is loaded."""
    held = tensor.detach().cpu()
    if held.is_floating_point():
        held = held.to(torch.promote_types(held.dtype, torch.float32))
    found = hashlib.sha256(f"{tuple(held.shape)}".encode())
    found.update(held.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore
    return found.hexdigest()


def check_facts(file: Iterable[Mapping[str, Any]], mine: Iterable[Mapping[str, Any]], adapter: str) -> None:
    """Raise ValueError, naming both, unless layers in a file are what an adapter's are."""
    theirs, ours = ({facts["layer"]: dict(facts) for facts in each} for each in (list(file), list(mine)))
    located = {_located(facts) for facts in theirs.values()}
    if located == {_located(facts) for facts in ours.values()} and (missing := sorted(ours.keys() - theirs.keys())):
        raise ValueError(incomplete(adapter, missing))
    if located != {_located(facts) for facts in ours.values()} or theirs.keys() != ours.keys():
        mine_too = " and ".join(sorted({_located(facts) for facts in ours.values()}))
        raise ValueError(
            f"the file holds banks for {' and '.join(sorted(located)) or 'no layer'}; this adapter ({adapter!r}) grows "
            f"{mine_too}: load it into an adapter made with the adapter_config.json beside it"
        )
    for layer, here in ours.items():
        bases = [facts.pop("base") or {} for facts in (theirs[layer], here)]
        for key in {**here, **theirs[layer]}:
            if here.get(key) != theirs[layer].get(key):
                raise ValueError(
                    f"the file's bank of layer {layer} has {key}={theirs[layer].get(key)!r}, that of this adapter "
                    f"({adapter!r}) {key}={here.get(key)!r}: load it with the adapter_config.json beside it"
                )
        if all(bases) and (unlike := difference(*bases)):
            raise ValueError(other_base(unlike))


def incomplete(adapter: str, missing: Iterable[int]) -> str:
    return (
        f"the file of adapter {adapter!r} has no bank for {', '.join(f'layer {layer}' for layer in missing)}, where it "
        f"grows too: load all of its tensors at once; if they are not there, {OPEN}"
    )


def other_base(unlike: str) -> str:
    return (
        f"this adapter was grown on another base ({unlike}) and would not be what was trained here. Load it onto the "
        "base that it grew on; or, if you mean it, set verify=False on its config: config = "
        "PCGrowConfig.from_pretrained(folder); config.verify = False; PeftModel.from_pretrained(base, folder, "
        "config=config)"
    )


def unsealed(where: str) -> str:
    return (
        f"{where} is not sealed: nothing says what its tensors are for, nor that they are as they were saved. If it is "
        "older than seals and you trust it, load it with a config whose verify is False: config = "
        "PCGrowConfig.from_pretrained(folder); config.verify = False; PeftModel.from_pretrained(base, folder, "
        "config=config); and save it again"
    )


def _located(facts: Mapping[str, Any]) -> str:
    """`layer 1: 1 4 | layer 2: 0 (newborns: 0)`."""
    found = []
    # JSON that was sorted has layer 10 before layer 2
    for layer, grown in sorted(facts["locus"].items(), key=lambda item: int(item[0])):
        newborns = facts["spawned"].get(layer)
        told = f" (newborns: {' '.join(map(str, newborns))})" if newborns else ""
        found.append(f"layer {layer}: {' '.join(map(str, grown))}{told}")
    return " | ".join(found)


def _whole(seals: Iterable[Seal], others: Contents) -> str:
    held = sorted(((seal.facts["layer"], seal.facts, seal.tensors) for seal in seals), key=lambda each: each[0])
    return hashlib.sha256(_text([held, others])).hexdigest()


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
