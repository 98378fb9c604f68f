"""What `settling/host.py` names of torch is there; after an upgrade, look here first."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE

from host_names import missing
from peft_pcgrow.settling import host

SIGNATURES = {
    "torch._C._current_graph_task_id": None,
    "torch._C._set_grad_enabled": None,
    "torch._C._is_cached_tensor": None,
    "torch._C._autograd._get_current_graph_task_keep_graph": None,
    "torch._C._autograd._top_saved_tensors_default_hooks": None,
    "torch._C._functions.ToCopyBackward0": None,
    "torch.autograd.Function._backward_cls": None,
    "torch.autograd.forward_ad._current_level": None,
    "torch.nn.modules.batchnorm._NormBase": None,
    "torch.utils.checkpoint.get_device_states": ("args",),
    "torch.utils.checkpoint.set_device_states": ("devices", "states", "device_type"),
    "torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX": None,
    "torch.nn.Module._apply": ("self", "fn"),
    "torch.nn.Module._load_from_state_dict": (
        *("self", "state_dict", "prefix", "local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs"),
    ),
}


def held():
    module, tensor = nn.Linear(2, 2), torch.zeros(1)
    modules = {f"torch.nn.Module.{name}": module for name in host.MODULE}
    return modules | {f"torch.Tensor.{name}": tensor for name in host.TENSOR}


def test_names():
    assert missing("torch", SIGNATURES, held()) == []


def test_a_name_that_is_gone_is_told(monkeypatch):
    monkeypatch.delattr("torch.nn.modules.batchnorm._NormBase")
    (line,) = missing("torch", SIGNATURES, held())
    assert line == (
        f"torch {torch.__version__} has no torch.nn.modules.batchnorm._NormBase, which peft_pcgrow needs: see "
        "peft_pcgrow/settling/host.py"
    )


def test_an_attribute_that_is_gone_is_told():
    (line,) = missing("torch", {}, {"torch.Tensor._version": object()})
    assert "has no torch.Tensor._version any more, which peft_pcgrow needs: see peft_pcgrow/settling/host.py" in line


def test_nodes():
    """A cast leaves the node that is known for it."""
    x = torch.zeros(1, requires_grad=True)
    assert isinstance((2 * x).to(torch.float64).grad_fn, host.Moved)
    assert not isinstance((2 * x).grad_fn, host.Moved)


def test_wrappers():
    """Each names what it holds as it did."""
    module = nn.Linear(2, 2)
    for name, wrapper in zip(host.WRAPPED[1:], (checkpoint_wrapper(module), torch.compile(module)), strict=True):
        assert getattr(wrapper, name) is module
    assert host.WRAPPED[0] == FSDP_WRAPPED_MODULE


def test_writes_are_counted():
    tensor = torch.zeros(1)
    before = host.times_written(tensor)
    tensor.add_(1)
    assert host.times_written(tensor) == before + 1
    with torch.inference_mode():
        assert host.times_written(torch.zeros(1)) == 0


@pytest.mark.parametrize("forward", [False, True])
def test_forward_mode(forward):
    if not forward:
        assert not host.in_forward_mode()
        return
    with torch.autograd.forward_ad.dual_level():
        assert host.in_forward_mode()
