"""Models whose weights are sharded over processes: by which engines they train, each here with one process."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from close import assert_all_close
from peft_pcgrow import PCGrowConfig
from peft_pcgrow.architectures import host
from peft_pcgrow.architectures.sharded import first_slice, like, local, whole
from tiny import build, grown, tokens


def in_parallel(model: nn.Module) -> nn.Module:
    """As tensor parallelism leaves a model."""
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), init_device_mesh("cpu", (1,))))
    return model


def test_other_sharded_parameters(one_process):
    with pytest.raises(ValueError, match=r"q_proj.weight is a DTensor.*growing needs its weights whole"):
        get_peft_model(in_parallel(build()), PCGrowConfig(locus={0: [1]}))


def by_layers(model: nn.Module) -> nn.Module:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


SHARDINGS = {
    "the model": fully_shard,
    "its layers": by_layers,
    "inside": lambda model: (fully_shard(model.get_base_model()), model)[1],
    "its experts": lambda model: (fully_shard(model.get_base_model().model.layers[1].mlp.experts), by_layers(model))[1],
}
ENGINES = {
    "FSDP1": (
        lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")),
        r"FullyShardedDataParallel \(FSDP1\).*Shard by fully_shard \(FSDP2",
    ),
    "tensor parallelism": (
        lambda model: (in_parallel(model.get_base_model()), model)[1],
        r"q_proj.weight is a DTensor.*not supported yet.*Shard by fully_shard",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "backprop"])
@pytest.mark.parametrize("how", SHARDINGS)
def test_fully_sharded(how, settle, one_process):
    """Wherever `fully_shard` is called, gradients are those of the model as it is."""
    model, plain = (grown(settle=settle).train() for _ in range(2))
    model = SHARDINGS[how](model)
    assert all(getattr(layer, host.MANAGED) for layer in model.base_model.tuner_layers())
    for each in (model, plain):
        each(input_ids=tokens(), labels=tokens()).loss.backward()
    want = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    assert all(bool(gradient.any()) for gradient in want.values())
    assert_all_close(found, want, "fp32")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ENGINES)
def test_other_engines(engine, one_process):
    """Refused at the first training forward, and again at the next."""
    wrap, why = ENGINES[engine]
    model = wrap(grown().train())
    for _ in range(2):
        with pytest.raises(ValueError, match=why):
            model(input_ids=tokens(), labels=tokens())
    plain = grown().train()  # another model of this process is whole
    plain(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(bool(p.grad.any()) for p in plain.parameters() if p.requires_grad)


def test_parts(one_process):
    """What is local, where it begins, what is whole, and sharded again."""
    stack = torch.randn(3, 4, 5)
    placed = distribute_tensor(stack, init_device_mesh("cpu", (1,)), [Shard(0)])
    assert first_slice(placed) == first_slice(stack) == 0
    for tensor in (local(placed), whole(placed), local(like(stack, placed)), like(stack, stack), whole(stack)):
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, stack)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 5\) is split along axis 1.*whole experts"):
        first_slice(distribute_tensor(stack, init_device_mesh("cpu", (1,)), [Shard(1)]))
