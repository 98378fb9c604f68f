"""An adapter's file on its own, without the model: read whole or not at all, and its banks held in fewer bits."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_pcgrow.adapter import seal
from peft_pcgrow.adapter.adapter_file import tail
from peft_pcgrow.adapter.seal import KEY, SEAL_MARK, Seal

# banks are the only weights among a layer's tensors
_BANK = re.compile(r".*\.pcgrow_\w+\.weight")


@dataclass(frozen=True)
class SealedFile:
    """What an adapter's file holds, by its keys; `seals` by those of the layers."""

    tensors: Mapping[str, Tensor]
    seals: Mapping[str, Seal]

    @classmethod
    def read(cls, place: Path) -> "SealedFile":
        """The file in an adapter's folder.

        Raises:
            ValueError: there is none, it was cut short, it has no seals, or it is not as it was saved.
        """
        path = place / SAFETENSORS_WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(f"{place} holds no {path.name}: save the adapter again, as safetensors")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} was not written to its end ({error}): save it again") from None
        end = f".{SEAL_MARK}.{KEY}"
        seals = {key.removesuffix(end): Seal.read(value) for key, value in tensors.items() if key.endswith(end)}
        if not seals or any(each.tensors is None for each in seals.values()):
            raise ValueError(seal.unsealed(str(path)))
        found = cls({key: value for key, value in tensors.items() if not key.endswith(end)}, seals)
        for key, each in seals.items():
            seal.check_contents(f"{path}, {key}", each.tensors or {}, found._of(key))
        seal.check_contents(f"{path}, beside the layers", seal.check_whole(seals.values()), found._others())
        return found

    def rounded(self, dtype: torch.dtype) -> tuple["SealedFile", float]:
        """The same with its banks in another dtype, sealed anew, and the error that this makes: the largest of any
        bank, norm over norm. Gates, LoRA and further modules stay as they are, and so do banks in few bits.

        Raises:
            ValueError: values out of the dtype's range.
        """
        tensors, worst = dict(self.tensors), 0.0
        for key, tensor in self.tensors.items():
            if not _BANK.fullmatch(key) or not tensor.is_floating_point():
                continue
            tensors[key] = cast = tensor.to(dtype)
            error, norm = (torch.linalg.vector_norm(each.double()) for each in (cast.double() - tensor, tensor))
            if not bool(torch.isfinite(cast).all()):
                raise ValueError(f"{key} has values that {dtype} does not: choose bfloat16, or float32")
            worst = max(worst, float(error / norm) if norm else 0.0)
        held, facts = SealedFile(tensors, self.seals), {n: each.facts for n, each in self.seals.items()}
        named = {facts[key]["layer"]: held._of(key) for key in facts}
        closed = seal.close(named, {each["layer"]: each for each in facts.values()}, held._others())
        return SealedFile(tensors, {key: closed[each["layer"]] for key, each in facts.items()}), worst

    def write(self, place: Path) -> None:
        place.mkdir(exist_ok=True)
        seals = {f"{key}.{SEAL_MARK}.{KEY}": each.write() for key, each in self.seals.items()}
        held = {key: tensor.contiguous() for key, tensor in {**self.tensors, **seals}.items()}
        save_file(held, place / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})

    def _of(self, layer: str) -> dict[str, Tensor]:
        start = f"{layer}."
        return {k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(f"{start}pcgrow_")}

    def _others(self) -> dict[str, Tensor]:
        inside = tuple(f"{key}.pcgrow_" for key in self.seals)
        return {tail(key): tensor for key, tensor in self.tensors.items() if not key.startswith(inside)}
