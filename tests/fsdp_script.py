"""Run by test_fsdp.py in two processes, and imported by it for the same steps in one."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_pcgrow import (
    Muon,
    PCGrowConfig,
    compress,
    create_pcgrow_optimizer,
    find_lr,
    measure_errors,
    order_by_surprisal,
)
from peft_pcgrow.maps.map_tensors import to_tensors
from tiny import VOCABULARY, build, domain, mixed, retain, spawned, tokens

# of two processes, one holds 4 and 4, 1 and 0, 2 and 1 nodes
LOCUS = {0: list(range(8)), 1: [1], 2: [1, 3, 6]}
STEPS, HALVES = 6, 2
WAYS: dict[str, dict[str, Any]] = {
    "sweep": {},
    "kept": {"keep_activations": 1},
    "direct": {"settle": "direct"},
    "partly direct": {"settle": "direct", "settle_depth": 1},
    "backprop": {"settle": "backprop"},
}
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def grow(**changes: Any) -> PeftModel:
    return get_peft_model(build(num_experts_per_tok=2), PCGrowConfig(locus=LOCUS, **changes)).train()


def newborns(**changes: Any) -> PeftModel:
    torch.manual_seed(0)  # LoRA's first matrices
    return spawned(protect=0.5, lora=LoraConfig(r=2, target_modules=["q_proj"]), **changes).train()


def layers_of(model: Any) -> nn.ModuleList:
    return getattr(model, "get_base_model", lambda: model)().model.layers


def sharded(model: Any, **options: Any) -> Any:
    """By its layers, if there are several processes."""
    if dist.is_initialized():
        for layer in layers_of(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)
    return model


def sharded_in_parts(model: Any) -> Any:
    """Attention and experts apart, and what is above and below the layers."""
    if dist.is_initialized():
        for layer in layers_of(model):
            for part in (layer.self_attn, layer.mlp.experts):
                fully_shard(part)
        fully_shard([model.model.norm, model.lm_head])
        fully_shard(model.model.embed_tokens)
    return sharded(model)


def share(ids: Tensor) -> Tensor:
    return ids[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else ids


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of one batch, of which each process has its share."""
    ids = share(tokens(4, 8, seed=3))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def mean(loss: Tensor) -> float:
    """Over the processes."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return float(loss)


def step(model: Any, optimizer: torch.optim.Optimizer, number: int, text: Callable[..., Tensor] = tokens) -> float:
    """One step on a batch in halves, clipped; its loss."""
    total = 0.0
    for half, ids in enumerate(text(seed=50 + number).chunk(HALVES)):
        if dist.is_initialized():
            model.set_requires_gradient_sync(half == HALVES - 1)
        ids = share(ids)
        loss = model(input_ids=ids, labels=ids).loss / HALVES
        loss.backward()
        total += mean(loss)
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def train(model: Any, half: Path | None = None, text: Callable[..., Tensor] = tokens) -> dict[str, Any]:
    """Losses and weights of all steps; a checkpoint after half of them."""
    optimizer, losses = create_pcgrow_optimizer(model, lr=0.02), []
    for number in range(STEPS):
        if half is not None and number == STEPS // 2:
            keep(model, optimizer, half)
            measure_errors(model, [tokens(2, 8)], progress=False)  # which training does not notice
        losses.append(step(model, optimizer, number, text))
    return {"losses": losses, "weights": trained(model)}


def saved(model: PeftModel, folder: Path) -> dict[str, Any]:
    """The adapter's file, and what a model that is sharded already reads of it."""
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    torch.manual_seed(1)
    # which evaluates with banks cast to the base's dtype
    config = PCGrowConfig(locus=LOCUS, init_weights=False)
    other = sharded(get_peft_model(build(dtype=torch.bfloat16, num_experts_per_tok=2), config))
    before, _ = trained(other), logits(other)
    set_peft_model_state_dict(other, load_peft_weights(str(folder)))
    return {"before": before, "after": trained(other), "weights": trained(model), "logits": logits(other)}


@torch.no_grad()
def logits(model: PeftModel) -> Tensor:
    return model.eval()(input_ids=tokens(seed=99), use_cache=False).logits


def written(model: PeftModel) -> Tensor:
    """What it generates."""
    register_fsdp_forward_method(model, "generate")
    return model.eval().generate(input_ids=mixed()[:, :16], max_new_tokens=6, min_new_tokens=6, do_sample=False)


def keep(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """A checkpoint of torch's, for any number of processes."""
    held, stepped = get_state_dict(model, optimizer)
    checkpoint.save({"model": held, "optimizer": stepped}, checkpoint_id=folder)


def resume(folder: Path) -> dict[str, Any]:
    """The second half of `train`, from a checkpoint on."""
    model = sharded(grow())
    optimizer = create_pcgrow_optimizer(model, lr=0.5)
    held, stepped = get_state_dict(model, optimizer)
    state = {"model": held, "optimizer": stepped}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses = [step(model, optimizer, number) for number in range(STEPS // 2, STEPS)]
    return {"losses": losses, "weights": trained(model)}


def halves(texts: list[Tensor]) -> list[Tensor]:
    """Of several processes, each has its half."""
    rank, world = (dist.get_rank(), 2) if dist.is_initialized() else (0, 1)
    return texts[rank * len(texts) // world : (rank + 1) * len(texts) // world]


def only(texts: list[Tensor], rank: int) -> list[Tensor]:
    return [] if dist.is_initialized() and dist.get_rank() != rank else texts


def maps() -> dict[str, Any]:
    """Of models that are sharded, if there are several processes: their maps; and how many layers are whole at a time
    while one is measured."""
    ours, theirs = [domain(1, 12, s) for s in range(8)], [retain(1, 12, s) for s in range(8)]
    base, parts, counts = sharded(build()), sharded_in_parts(build()), set()
    born = sharded(newborns())
    handles = [
        layer.mlp.register_forward_hook(
            lambda *_: counts.add(sum(not isinstance(each.mlp.gate.weight, DTensor) for each in layers_of(base)))
        )
        for layer in layers_of(base)
    ]
    found = {
        "base": measure_errors(base, halves(ours), retain=halves(theirs), window=4, progress=False),
        "without text": measure_errors(base, only(ours[:3], 0), heldout=only(ours[4:], 1), progress=False),
        "in parts": measure_errors(parts, halves(ours), settle="direct", settle_depth=1, progress=False),
        "newborns": measure_errors(born, halves(ours), progress=False),
    }
    for handle in handles:
        handle.remove()
    born.refit_gates(halves(ours), halves(theirs))
    gates = {name: held.clone() for name, held in born.named_buffers() if "pcgrow_gate" in name}
    return {"maps": {n: to_tensors(emap) for n, emap in found.items()}, "refitted": gates, "whole at a time": counts}


class Counting(TorchDispatchMode):
    """Bytes that a process sends or gets by collectives, by their names: of the whole that is gathered or spread."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            held = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            size = max((each.numel() * each.element_size() for each in held), default=0)
            self.sent[func.name()] = self.sent.get(func.name(), 0) + size
        return func(*args, **(kwargs or {}))


def traffic(**changes: Any) -> dict[str, int]:
    """Bytes of a step after the first."""
    model = sharded(grow(**changes))
    optimizer = create_pcgrow_optimizer(model, lr=0.02)
    step(model, optimizer, 0)
    with Counting() as counted:
        step(model, optimizer, 1)
    return counted.sent


def said(call: Callable[[], Any]) -> str:
    """What is raised."""
    try:
        call()
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def broken_steps() -> dict[str, str]:
    """What is raised at a step that would train wrong, and whether a weight changed."""

    def attempt(spoil: Callable[[PeftModel], Any], steps: int = 1, model: PeftModel | None = None) -> str:
        model = sharded(grow()) if model is None else model
        optimizer, before = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), trained(model)

        def run() -> None:
            for _ in range(steps):
                ids = share(tokens(4, 8))
                model(input_ids=ids, labels=ids).loss.backward()
                spoil(model)
                optimizer.step()

        found, after = said(run), trained(model)
        return found if all(torch.equal(after[name], before[name]) for name in before) else f"{found} (moved)"

    def poison(model: PeftModel) -> None:
        last = [p for p in model.parameters() if p.requires_grad][-1].grad
        if dist.get_rank() == 1:
            last.to_local()[0, 0, 0] = float("nan")

    def empty(model: PeftModel) -> None:
        for p in model.parameters():
            p.grad = None if p.grad is None else torch.zeros_like(p.grad)

    def forget(model: PeftModel) -> None:
        model.zero_grad()

    partly = get_peft_model(build(num_experts_per_tok=2), PCGrowConfig(locus=LOCUS, modules_to_save=["lm_head"]))
    for layer in partly.train().get_base_model().model.layers:
        fully_shard(layer)
    return {
        "NaN in one process": attempt(poison),
        "zeros": attempt(empty, steps=3),
        "lost": attempt(forget),
        "outside": attempt(lambda _: None, model=partly),
    }


def ending() -> Iterator[Tensor]:
    """Text in the midst of which process 1 ends."""
    for seed in range(4):
        yield tokens(2, 8, seed)
        if dist.get_rank() == 1:
            os._exit(0)


def failing_maps() -> dict[str, str]:
    """What is raised where maps of a sharded model cannot be measured, or a process fails in the midst."""
    model, rank = build(), dist.get_rank()
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1 :] = float("nan")
    sharded(model)

    def broken() -> Iterator[Tensor]:
        yield tokens()
        if rank == 1:
            raise OSError("the disk is gone")
        yield from tokens(8).split(2)

    text = [tokens(2, 8), torch.full((2, 8), VOCABULARY - 2 + rank)]
    calls: dict[str, dict[str, Any]] = {
        "map, relaxed": {"batches": text, "settle": "relax"},
        "map, text of its own": {"batches": text, "retain": "self"},
        "map, no disk": {"batches": broken()},
        "map, not finite": {"batches": text},
    }
    return {name: said(lambda call=call: measure_errors(model, **call, progress=False)) for name, call in calls.items()}


def refused() -> dict[str, str]:
    """What is raised before anything is done."""
    model, text = sharded(grow()), tokens(8).split(2)
    matrix = fully_shard(nn.Linear(4, 4))
    matrix(torch.ones(1, 4)).sum().backward()
    muon = Muon([matrix.weight])
    early = grow()
    optimizer = create_pcgrow_optimizer(early, lr=0.02)
    return {
        "optimizer before": said(lambda: step(sharded(early), optimizer, 0)),
        **failing_maps(),
        "order": said(lambda: order_by_surprisal(list(text[0]), model, progress=False)),
        "find_lr": said(lambda: find_lr(model, text)),
        "merge": said(model.merge_adapter),
        "another adapter": said(lambda: model.add_adapter("more", PCGrowConfig(locus=LOCUS))),
        "plan": said(lambda: compress.plan(model, target=0.5, progress=False)),
        "Muon on split matrices": said(muon.step),
        "FSDP1": said(
            lambda: FullyShardedDataParallel(grow(), use_orig_params=True, device_id=torch.device("cpu"))(
                input_ids=text[0], labels=text[0]
            )
        ),
    }


def main(folder: Path) -> None:
    newborns()  # whose map is then at hand, of one process
    dist.init_process_group("gloo")
    found: dict[str, Any] = {name: gradients(sharded(grow(**changes))) for name, changes in WAYS.items()}
    found["bf16"] = {way: gradients(sharded(grow(settle=way), mp_policy=POLICY)) for way in ("sweep", "backprop")}
    found["offloaded"] = gradients(sharded(grow(), offload_policy=CPUOffloadPolicy(pin_memory=False)))
    checkpointing = grow()
    checkpointing.gradient_checkpointing_enable()
    found["checkpointed"] = gradients(sharded(checkpointing))
    deepened = sharded(grow())
    found["deepened"] = train(deepened, folder / "half")
    found["resumed"] = resume(folder / "half")
    found["resumed from one"] = resume(folder / "one")
    found["saved"] = saved(deepened, folder / "adapter")
    born = sharded(newborns())
    found["spawned"] = train(born, text=mixed)
    found["written"] = written(born)
    found["maps"] = maps()
    found["buffers"] = {name: held.clone() for name, held in born.named_buffers() if "pcgrow" in name}
    found["traffic"] = {way: traffic(settle=way) for way in ("sweep", "direct", "backprop")}
    found["broken"] = broken_steps()
    found["refused"] = refused()
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    found["dying"] = said(lambda: measure_errors(sharded(build()), ending(), progress=False))
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    os._exit(0)  # there is nobody to say goodbye to


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
