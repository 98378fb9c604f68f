"""Run by test_expert_parallel.py in two processes that share out a model's experts, and imported by it for the same in
one."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from engines_script import tried
from peft_pcgrow import (
    ErrorMap,
    PCGrowConfig,
    compress,
    create_pcgrow_optimizer,
    find_experts,
    find_lr,
    measure_errors,
    order_by_surprisal,
)
from peft_pcgrow.maps.map_tensors import to_tensors
from tiny import LOCUS, domain, logits, mixed, retain, tokens

# norm that gradients are clipped to
CLIPPED = 0.05
# what grows: how, where ("one side": all of it in the first process), and what settles it
GROWTHS: dict[str, dict[str, Any]] = {
    "backprop": {"settle": "backprop"},
    "sweep": {},
    "direct": {"settle": "direct"},
    "one side": {"locus": {1: [1], 2: [0, 2]}},
    "spawn": {"grow": "spawn", "gate_fpr": 0.05},
    "protect": {"grow": "spawn", "gate_fpr": 0.05, "protect": 0.5},
}


class Models:
    """Those of a folder, shared out over two processes or not.

    Args:
        plan: of `DistributedConfig`, beside the sizes; None: whole.
    """

    def __init__(self, folder: Path, plan: dict[str, Any] | None):
        self.folder, self.plan = folder, plan
        self.map = ErrorMap.load(folder / "map")

    def base(self, name: str = "base", **sizes: int) -> Any:
        given = {}
        if self.plan is not None:
            from transformers.distributed import DistributedConfig

            given["distributed_config"] = DistributedConfig(**(sizes or {"tp_size": 2, "ep_size": 2}), **self.plan)
        return AutoModelForCausalLM.from_pretrained(self.folder / name, **given)

    def grown(self, **changes: Any) -> PeftModel:
        if changes.get("grow") == "spawn":
            changes["error_map"] = self.map
        return get_peft_model(self.base(), PCGrowConfig(**{"locus": LOCUS, **changes})).train()  # type: ignore

    def loaded(self, name: str) -> PeftModel:
        return PeftModel.from_pretrained(self.base(), str(self.folder / name)).eval()


def whole(model: PeftModel, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """Something of each bank, as an adapter file has it, with nothing in the places that are left over."""
    found = {}
    for layer in model.base_model.tuner_layers():
        for adapter in layer.births:
            for name, weight in layer.bank(adapter).items():
                held = of(weight)
                assert held is not None
                found[f"{layer.layer_index} {adapter} {name}"] = layer.collected(adapter, name, held.detach()).clone()
                if layer.share is not None:
                    here = held.detach().to_local()[len(layer.places_here(adapter)) :]
                    assert not here.any(), "an expert of no donor's"
    return found


def gradients(model: PeftModel, ids: Tensor) -> dict[str, Any]:
    output = model(input_ids=ids, labels=ids)
    loss = output.loss if ids.numel() > 1 else output.logits.square().sum()
    loss.backward()
    found = {"loss": loss.detach(), **whole(model, lambda weight: weight.grad)}
    norm: Any = clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIPPED)
    found["norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return found | {f"clipped {name}": g for name, g in whole(model, lambda weight: weight.grad).items()}


def stepped(model: PeftModel, kind: str, steps: int = 20, texts: Callable[..., Tensor] = tokens) -> dict[str, Any]:
    train = [p for p in model.parameters() if p.requires_grad]
    muon = kind == "muon"
    optimizer = create_pcgrow_optimizer(model, lr=0.05) if muon else torch.optim.AdamW(train, lr=0.01)
    losses = []
    for step in range(steps):
        ids = texts(seed=step % 2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip_grad_norm_(train, CLIPPED)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "banks": whole(model, lambda weight: weight)}


def numbers(emap: ErrorMap) -> dict[str, Any]:
    return to_tensors(emap)[0]


def several(models: Models) -> dict[str, Any]:
    """Two adapters at once, and each sample with its own."""
    model = models.grown()
    model.add_adapter("second", PCGrowConfig(locus={0: [2, 6], 1: [5]}))
    model.base_model.set_adapter(["default", "second"])
    model.train()
    found = gradients(model, tokens())
    model.eval()
    names = ["default", "second", "__base__", "default"]
    with torch.no_grad():
        found["mixed"] = model(input_ids=tokens(4, 8), adapter_names=names).logits
        with model.disable_adapter():
            found["base"] = model(input_ids=tokens(4, 8)).logits
    return found


def resumed(models: Models) -> list[list[float]]:
    """Losses of two steps, and of the same from files: the adapter's, and each process's own of the optimizer."""
    found, file = [], models.folder / f"optimizer{dist.get_rank()}.pt"
    model = models.grown()
    for again in (False, True):
        optimizer = create_pcgrow_optimizer(model, lr=0.05)
        for step in (2, 3) if again else range(4):
            if step == 2 and not again:
                torch.save(optimizer.state_dict(), file)
                model.save_pretrained(str(models.folder / "half"), is_main_process=dist.get_rank() == 0)
                dist.barrier()
            elif step == 2:
                optimizer.load_state_dict(torch.load(file, weights_only=False))
            ids = tokens(seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        half = str(models.folder / "half")
        model = PeftModel.from_pretrained(models.base(), half, is_trainable=True).train()
    return [found[2:4], found[4:]]


def everything(models: Models, beside: Models) -> dict[str, Any]:
    """What is to be the same in two processes as in one; `beside`: with attention whole in every process."""
    found: dict[str, Any] = {}
    rank = dist.get_rank() if dist.is_initialized() else 0
    for name, changes in GROWTHS.items():
        ids = mixed() if "grow" in changes else tokens()
        found[name] = gradients(models.grown(**changes), ids)
    found["beside"] = gradients(beside.grown(), tokens())
    found["one token"] = gradients(beside.grown(), tokens(1, 1))  # of no expert of the second process in layer 1
    found["muon"] = stepped(beside.grown(), "muon")
    found["adamw"] = stepped(model := models.grown(), "adamw", 4)
    model.save_pretrained(str(models.folder / f"saved {models.plan is not None}"), is_main_process=rank == 0)
    found["trained"] = logits(model.eval())
    found["protect adamw"] = stepped(model := models.grown(**GROWTHS["protect"]), "adamw", 4, mixed)
    found["spawned"] = logits(model.eval())
    texts = [domain(8, 12, seed=1), retain(8, 12, seed=1)]
    born = beside.grown(**GROWTHS["spawn"]).eval()
    born.base_model.refit_gates([domain(64, seed=1)], [retain(64, seed=1)])
    found["gates"] = {name: t for name, t in born.named_buffers() if "pcgrow_gate" in name}
    found["rate"] = torch.tensor(find_lr(beside.grown(), [tokens(4, 12, seed=s) for s in (3, 3)]))
    found["order"] = order_by_surprisal([*texts[0]], beside.grown(), return_surprisal=True, progress=False)[1]
    found["written"] = model.generate(input_ids=tokens(2, 8), max_new_tokens=6, do_sample=False)
    how: dict[str, Any] = {"progress": False, "window": 4, "retain": [texts[1]]}
    found["map"] = numbers(measure_errors(models.base(), [domain(8, 12, seed=s) for s in range(5)], **how))
    found["map of grown"] = numbers(measure_errors(model, [domain(4, 12, seed=s) for s in range(4)], progress=False))
    found["several"] = several(models)
    loaded = models.loaded("adapter")
    found["loaded"] = logits(loaded)
    merged = models.base("merged").generate(input_ids=tokens(2, 8), max_new_tokens=6, do_sample=False)
    found["merged"] = merged, loaded.generate(input_ids=tokens(2, 8), max_new_tokens=6, do_sample=False)
    again = models.folder / f"again {models.plan is not None}"
    loaded.save_pretrained(str(again), is_main_process=rank == 0)
    if dist.is_initialized():
        dist.barrier()
    found["again"] = load_file(again / "adapter_model.safetensors")
    return found


def refused(models: Models) -> dict[str, str]:
    """What is said of what cannot be had."""
    grown, ids = models.grown(), tokens(2, 8)
    other = tokens(2, 8, seed=dist.get_rank())
    config = {"locus": LOCUS}
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    return tried(
        {
            "lora": lambda: get_peft_model(models.base(), PCGrowConfig(**config, lora=lora)),
            "modules": lambda: get_peft_model(models.base(), PCGrowConfig(**config, modules_to_save=["lm_head"])),
            "parts": lambda: models.grown(resolution="matrix", locus=None, parts={1: {1: ["down_proj"]}}),
            "low": lambda: PeftModel.from_pretrained(
                models.base(), str(models.folder / "adapter"), low_cpu_mem_usage=True
            ),
            "find": lambda: find_experts(models.base()),
            "plan": lambda: compress.plan(models.base(), target=0.5, retain=[ids], progress=False),
            "shrink": lambda: compress.shrink_adapter(grown, bits=4),
            "merge": grown.merge_adapter,
            "inside": lambda: stepped_inside(grown),
            "map of other text": lambda: measure_errors(models.base(), [other], progress=False),
            "train on other text": lambda: grown(input_ids=other, labels=other),
            "other text each": lambda: models_of(models, fsdp_size=2, ep_size=2),
        }
    )


def stepped_inside(model: PeftModel) -> None:
    optimizer, ids = create_pcgrow_optimizer(model, lr=0.1, inside_sweep=True), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def models_of(models: Models, **sizes: int) -> None:
    get_peft_model(models.base(**sizes), PCGrowConfig(locus=LOCUS))  # type: ignore


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    models = Models(folder, {})
    rules = dict.fromkeys(models.base().tp_plan, "replicate")
    beside = Models(folder, {"tp_plan": rules})
    found = everything(models, beside) | {"said": refused(models), "resumed": resumed(beside)}
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
