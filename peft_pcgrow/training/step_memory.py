"""What a training step takes at its peak, from a model's shapes alone: nothing is loaded, and nothing computed.

    peak = base + adapter + state + max(output, descent, update)

base      weights and buffers as they are loaded.
adapter   banks in fp32; or LoRA, in fp32 too. state: what the optimizer keeps of it, once as much (Muon's momentum) or
          twice (AdamW).
output    when the loss is differentiated: what is kept of the layers, and what the embedding, the output head and the
          loss take there and back: logits in the model's dtype and, for the loss, in fp32, with a gradient of each.
descent   at layer l on the way down: what is kept of the layers up to it (by the sweep, of all), the gradients of the
          adapter above it, and what l takes to run with a graph and back: its inner activations, errors, its own
          gradients. Where nothing of it is kept but its input, or less, it runs again first.
update    all gradients, and copies of the matrices that Muon orthogonalises at once.

What is kept of a layer from the forward:

    sweep     its input, from the lowest grown layer up
    direct    of grown layers what their banks' gradients take: the experts' inputs, and which row goes where
    backprop  all that autograd saves, from the lowest grown layer up
    LoRA      the same, of all layers

Each kind of decoder layer runs once, on the meta device, and every storage that it makes counts as long as it lives.
Two things are stood in for: attention by scaled_dot_product_attention takes what fused kernels do, and experts take
what `architectures.one_sort` and transformers' grouped products do. Newborns take what deepened experts do; their
gates, some numbers a token, and protected directions are not counted, nor is what a runtime adds (a CUDA context,
fragments). Shapes: T tokens, K experts per token, R = T K rows, of which an expert has equally many, H hidden, I inner.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from peft_pcgrow.architectures.experts import text_config
from peft_pcgrow.architectures.find import Tree, adopt
from peft_pcgrow.training.host import memory_of
from peft_pcgrow.training.meta_experts import MetaExperts
from peft_pcgrow.training.meta_trace import MetaTrace, StepBytes
from peft_pcgrow.training.muon import AT_ONCE

WAYS = ("sweep", "direct", "backprop")
LORA = "LoRA"
# of what trains, how often an optimizer keeps it
STATES = {"Muon": 1, "AdamW": 2}
FP32, BF16 = 4, 2
RANK = 16


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step by one way and one optimizer; see the module for what each of them is."""

    way: str
    optimizer: str
    base: int
    adapter: int
    state: int
    output: int
    descent: int
    update: int

    @property
    def step(self) -> int:
        """What a step takes beyond what is there before it."""
        return max(self.output, self.descent, self.update)

    @property
    def peak(self) -> int:
        return self.base + self.adapter + self.state + self.step


def step_memory(
    model: nn.Module, tree: Tree, grown: Mapping[int, int], batch: int, length: int, device: str = "cuda"
) -> list[StepMemory]:
    """By every way, with Muon and with AdamW; and LoRA of rank 16 on the linear layers beside the nodes, with AdamW.

    Args:
        model: a causal LM on the meta device, in the dtype that it would be loaded in; it is of no use afterwards.
        tree: of it (see `find_experts`). grown: how many nodes grow, by layer.
        batch, length: of what a step is given. device: whose kernels are counted, "cuda" or "cpu".

    Raises:
        RuntimeError, NotImplementedError: the model's own code asks for numbers, and there are none.
    """
    held = (*model.parameters(), *model.buffers())
    base = sum({memory_of(each): each.untyped_storage().nbytes() for each in held}.values())
    model.requires_grad_(False)
    tree = adopt(tree)
    parents = [(model.get_submodule(site.name.rpartition(".")[0]), site.name.rpartition(".")[2]) for site in tree.sites]
    stands = [MetaExperts(site.base, grown.get(site.layer, 0), device) for site in tree.sites]
    for (parent, name), stand in zip(parents, stands, strict=True):
        setattr(parent, name, stand)
    traced = _trace(model, tree, batch, length)
    adapter = sum(p.numel() for stand in stands for p in stand.bank) * FP32
    update = {"AdamW": adapter, "Muon": adapter + _muon([p.shape for s in stands for p in s.bank], device)}
    found = []
    for way in WAYS:
        output, descent = _peaks(way, traced, min(grown))
        for optimizer, times in STATES.items():
            sizes = base, adapter, times * adapter, output, descent, update[optimizer]
            found.append(StepMemory(way, optimizer, *sizes))
    for stand in stands:
        stand.bank = nn.ParameterList()
    if not (lora := _put_lora(model, tree)):
        return found
    output, descent = _peaks(LORA, _trace(model, tree, batch, length, settles=False), 0)
    return [*found, StepMemory(LORA, "AdamW", base, lora, 2 * lora, output, descent, lora)]


def _trace(model: nn.Module, tree: Tree, batch: int, length: int, settles: bool = True) -> StepBytes:
    kinds = getattr(text_config(getattr(model, "config", None)), "layer_types", None) or ()
    trained = {id(layer): [p for p in layer.parameters() if p.requires_grad] for layer in tree.layers}

    def kind(place: int) -> str | None:
        return kinds[place] if place < len(kinds) else None

    trace = MetaTrace(model, tree.layers, lambda layer: trained[id(layer)], kind, settles)
    return trace.run(batch, length)


def _peaks(way: str, step: StepBytes, lowest: int) -> tuple[int, int]:
    """`output` and `descent` of the module's formula; `lowest`: the lowest layer with something that trains."""
    kept, backs = [], []
    for place, layer in enumerate(step.layers):
        keeps, back = 0, layer.there
        if way == "sweep" and place >= lowest:
            keeps, back = layer.entered, layer.back if place > lowest else layer.alone_back
        elif way == "direct" and layer.weights:
            keeps, back = layer.alone + layer.entered, layer.alone_back - layer.alone
        elif way not in ("sweep", "direct") and place >= lowest:
            # nothing trains below the lowest
            keeps = layer.saved if place > lowest else layer.alone
            back = layer.back - layer.saved
        kept.append(keeps)
        backs.append(back)
    settles = way in ("sweep", "direct")
    gradients = [layer.weights for layer in step.layers]
    # the sweep's inputs are let go of at its end, what autograd saved on the way
    below = [sum(kept if way == "sweep" else kept[: place + 1]) for place in range(len(kept))]
    above = [sum(gradients[place + 1 :]) for place in range(len(kept))]
    # settling keeps the top layer's output beside the copy that it hands on
    top = step.layers[-1].entered * (2 if settles else 1)
    return step.around + sum(kept) + top, step.beside + top + max(map(sum, zip(below, above, backs, strict=True)))


def _muon(shapes: list[torch.Size], device: str) -> int:
    """Copies that Muon makes of matrices that it orthogonalises at once, of the same shape."""
    most = 0
    for shape in {shape[1:] for shape in shapes if len(shape) == 3}:
        one = shape.numel()
        numbers = min(sum(each[0] for each in shapes if each[1:] == shape) * one, max(AT_ONCE, one))
        most = max(most, int(numbers * (2 + 2 * min(shape) / max(shape))))
    return most * (BF16 if device == "cuda" else FP32)


def _put_lora(model: nn.Module, tree: Tree) -> int:
    """LoRA on the linear layers of the decoder that are in no block of nodes; the bytes of it."""
    inside = {id(module) for layer in tree.layers for module in layer.modules()}
    nodes = {id(m) for site in tree.sites for m in model.get_submodule(site.name.rpartition(".")[0]).modules()}
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside - nodes
    ]
    if not names:
        return 0
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()  # as get_peft_model has it
    return sum(p.numel() for p in trained) * FP32
