"""What fails where the host reads what a device has computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Asked(TorchDispatchMode):
    """Fails where the host asks for what a GPU has computed."""

    ASKS = ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "equal", "is_nonzero", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name == ask or name.startswith(("unique", "_unique", ask + "_")) for ask in self.ASKS), name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            kinds = [held.dtype for held in args[1] if held is not None]
            assert not {torch.bool, torch.uint8} & {*kinds}, f"{name} by a mask"
            assert name == "index" or not (len(args) > 3 and args[3]), "an accumulating index_put"
        return func(*args, **(kwargs or {}))


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("the host read a tensor")


@contextmanager
def nothing_asked() -> Iterator[None]:
    """Reads that never come to a dispatcher are looked for too."""
    with pytest.MonkeyPatch.context() as patch, Asked():
        for name in ("item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__"):
            patch.setattr(Tensor, name, refuse)
        yield
