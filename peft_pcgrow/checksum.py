"""Checksums that travel with an adapter's weights, so that an altered file is noticed when it is loaded."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

MARK = "pcgrow_checksum"


def checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """sha256 over names, shapes and values, `[32]` uint8; of fp32, so that a bank hashes alike in half precision."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def seal(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's state dict with the checksum of each layer's bank filled in."""
    return {**state_dict, **{key: checksum(bank) for key, bank in _layers(state_dict)}}


def verify(state_dict: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a bank does not have the checksum beside it. Unsealed banks (all zeros) pass."""
    for key, bank in _layers(state_dict):
        noted = state_dict[key].cpu()
        if bool(noted.any()) and not torch.equal(noted, checksum(bank)):
            raise ValueError(
                f"the grown experts of {key.rpartition('.' + MARK)[0]} do not have the checksum saved beside them: the "
                "adapter file was altered or mixed up with another; copy it again from where it was saved"
            )


def _layers(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Per layer, the key of its checksum and its bank's tensors by their name within the layer."""
    for key in state_dict:
        layer, found, adapter = key.rpartition(f".{MARK}")
        if found:
            # the adapter's name, if the keys have it, stands after the stack's or buffer's name
            names = {
                k: k.removeprefix(f"{layer}.") for k in state_dict if k.startswith(f"{layer}.pcgrow_") and k != key
            }
            yield key, {f"{name}.".replace(f"{adapter}.", ".", 1): state_dict[k] for k, name in names.items()}
