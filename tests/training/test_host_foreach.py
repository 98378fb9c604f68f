"""What `training/host.py` names of torch is there; after an upgrade, look here first."""

import torch

from host_names import missing
from peft_pcgrow.training import host

NAMES = (
    *(f"torch._foreach_{name}_" for name in ("add", "lerp", "mul")),
    "torch.ops.aten._local_scalar_dense.default",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_map",
)


def test_names():
    held = {
        "torch.UntypedStorage._cdata": torch.zeros(1).untyped_storage(),
        f"torch.Tensor.{host.WAITING}": torch.zeros(1),
    }
    assert missing("torch", dict.fromkeys(NAMES), held) == []


def test_memory():
    """Views share it, on the meta device too."""
    tensor, other = torch.zeros(4, device="meta"), torch.zeros(4, device="meta")
    assert host.memory_of(tensor) == host.memory_of(tensor[1:]) != host.memory_of(other)
