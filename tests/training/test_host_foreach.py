"""What `training/host.py` names of torch is there; after an upgrade, look here first."""

import torch

from host_names import missing
from peft_pcgrow.training.host import WAITING


def test_names():
    held = {f"torch.Tensor.{WAITING}": torch.zeros(1)}
    assert missing("torch", {f"torch._foreach_{name}_": None for name in ("add", "lerp", "mul")}, held) == []
