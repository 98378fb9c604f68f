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

Of N processes that `fully_shard` (FSDP2) spreads it over, layer by layer, each holds its own activations, and of base,
adapter, gradients and state an N-th (of a stack, as many whole experts as the fullest). On top of output and descent
come the weights that are gathered for a while: those outside of the layers, and on the way down layer l's and the next
one's, their banks in the base's dtype.

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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from peft_pcgrow.architectures.experts import expert_stacks, text_config
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
class Spread:
    """Of a model over `ranks` processes: bytes that each gathers outside of the layers; for each layer; and what of a
    layer trains, whose gradients it sends. `copies`: of a layer that gloo makes while it gathers one, on CPUs."""

    ranks: int = 1
    outside: int = 0
    layers: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()
    copies: int = 0

    def held(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of tensors, each split along its first axis, on the fullest process."""
        return sum(ceil(len(t) / self.ranks) * (t.numel() // len(t)) * t.element_size() for t in tensors)

    def on_top(self, place: int, back: int) -> int:
        """What a layer takes on the way down, `back` without other processes."""
        if self.ranks == 1:
            return back
        below = self.layers[place - 1] if place else 0
        # sent by the layer above, and let go of when the next one sends
        above = self.sent[place + 1] if place + 1 < len(self.sent) else 0
        computes = self.layers[place] + below + above + back
        gathers = self.layers[place] + (1 + self.copies) * below + above
        return self.outside + max(computes, gathers, below + (2 + self.copies) * self.sent[place])


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
    model: nn.Module,
    tree: Tree,
    grown: Mapping[int, int],
    batch: int,
    length: int,
    device: str = "cuda",
    ranks: int = 1,
) -> list[StepMemory]:
    """By every way, with Muon and with AdamW; and LoRA of rank 16 on the linear layers beside the nodes, with AdamW.

    Args:
        model: a causal LM on the meta device, in the dtype that it would be loaded in; it is of no use afterwards.
        tree: of it (see `find_experts`). grown: how many nodes grow, by layer.
        batch, length: of what a step is given, each process. device: whose kernels are counted, "cuda" or "cpu".
        ranks: processes that share the weights.

    Raises:
        RuntimeError, NotImplementedError: the model's own code asks for numbers, and there are none.
    """
    base = _base(model, ranks)
    bare = [_bytes(layer.parameters()) for layer in tree.layers]
    spread = Spread(ranks, _bytes(model.parameters()) - sum(bare) if ranks > 1 else 0, copies=int(device == "cpu"))
    model.requires_grad_(False)
    tree = adopt(tree)
    parents = [(model.get_submodule(site.name.rpartition(".")[0]), site.name.rpartition(".")[2]) for site in tree.sites]
    stands = {site.layer: MetaExperts(site.base, grown.get(site.layer, 0), device) for site in tree.sites}
    for (parent, name), stand in zip(parents, stands.values(), strict=True):
        setattr(parent, name, stand)
    traced = _trace(model, tree, batch, length)
    banks = [p for stand in stands.values() for p in stand.bank]
    adapter = spread.held(banks)
    shapes = [torch.Size((ceil(len(p) / ranks), *p.shape[1:])) for p in banks]
    update = {"AdamW": adapter, "Muon": adapter + _muon(shapes, device)}
    found, growing = [], _with_trained(spread, bare, tree)
    for way in WAYS:
        output, descent = _peaks(way, traced, min(grown), growing)
        for optimizer, times in STATES.items():
            sizes = base, adapter, times * adapter, output, descent, update[optimizer]
            found.append(StepMemory(way, optimizer, *sizes))
    for stand in stands.values():
        stand.bank = nn.ParameterList()
    if not (trained := _put_lora(model, tree)):
        return found
    lora = spread.held(trained)
    traced = _trace(model, tree, batch, length, settles=False)
    output, descent = _peaks(LORA, traced, 0, _with_trained(spread, bare, tree))
    return [*found, StepMemory(LORA, "AdamW", base, lora, 2 * lora, output, descent, lora)]


def _with_trained(spread: Spread, bare: Sequence[int], tree: Tree) -> Spread:
    """With the layers' own bytes, `bare`, and what trains in them, gathered and sent in the base's dtype."""
    size = expert_stacks(tree.sites[0].base)["down_proj"].element_size()
    sent = [sum(p.numel() for p in layer.parameters() if p.requires_grad) * size for layer in tree.layers]
    return replace(spread, layers=tuple(map(sum, zip(bare, sent, strict=True))), sent=tuple(sent))


def _base(model: nn.Module, ranks: int) -> int:
    """Bytes of weights and buffers on a process."""
    held = {memory_of(each): each for each in (*model.parameters(), *model.buffers())}
    split = Spread(ranks).held(p for p in model.parameters() if ranks > 1 and held.pop(memory_of(p), None) is not None)
    return split + sum(each.untyped_storage().nbytes() for each in held.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _trace(model: nn.Module, tree: Tree, batch: int, length: int, settles: bool = True) -> StepBytes:
    kinds = getattr(text_config(getattr(model, "config", None)), "layer_types", None) or ()
    trained = {id(layer): [p for p in layer.parameters() if p.requires_grad] for layer in tree.layers}

    def kind(place: int) -> str | None:
        return kinds[place] if place < len(kinds) else None

    trace = MetaTrace(model, tree.layers, lambda layer: trained[id(layer)], kind, settles)
    return trace.run(batch, length)


def _peaks(way: str, step: StepBytes, lowest: int, spread: Spread) -> tuple[int, int]:
    """`output` and `descent` of the module's formula; `lowest`: the lowest layer with something that trains."""
    kept, backs = [], []
    for place, layer in enumerate(step.layers):
        keeps, back = 0, layer.there
        if way == "sweep" and place >= lowest:
            keeps, back = layer.entered, layer.back if place > lowest else layer.alone_back
        elif way == "direct" and layer.weights:
            # the graph's output too, which autograd alone has no need of
            keeps = layer.alone + (layer.entered if spread.ranks == 1 else 0)
            back = layer.alone_back - layer.alone
        elif way not in ("sweep", "direct") and place >= lowest:
            # nothing trains below the lowest
            keeps = layer.saved if place > lowest else layer.alone
            back = layer.back - layer.saved
        kept.append(keeps)
        backs.append(back)
    settles = way in ("sweep", "direct")
    gradients = [layer.weights for layer in step.layers]
    # the sweep's inputs are let go of at its end, what autograd saved on the way, as by `settling.checkpointed`
    below = [sum(kept if way == "sweep" and spread.ranks == 1 else kept[: place + 1]) for place in range(len(kept))]
    above = [sum(gradients[place + 1 :]) // spread.ranks for place in range(len(kept))]
    # settling keeps the top layer's output beside the copy that it hands on
    top = step.layers[-1].entered * (2 if settles and spread.ranks == 1 else 1)
    backs = [spread.on_top(place, back) for place, back in enumerate(backs)]
    output = step.around + sum(kept) + top + spread.outside
    return output, step.beside + top + max(map(sum, zip(below, above, backs, strict=True)))


def _muon(shapes: list[torch.Size], device: str) -> int:
    """Copies that Muon makes of matrices that it orthogonalises at once, of the same shape."""
    most = 0
    for shape in {shape[1:] for shape in shapes if len(shape) == 3}:
        one = shape.numel()
        numbers = min(sum(each[0] for each in shapes if each[1:] == shape) * one, max(AT_ONCE, one))
        most = max(most, int(numbers * (2 + 2 * min(shape) / max(shape))))
    return most * (BF16 if device == "cuda" else FP32)


def _put_lora(model: nn.Module, tree: Tree) -> list[nn.Parameter]:
    """LoRA on the linear layers of the decoder that are in no block of nodes: what trains of it."""
    inside = {id(module) for layer in tree.layers for module in layer.modules()}
    nodes = {id(m) for site in tree.sites for m in model.get_submodule(site.name.rpartition(".")[0]).modules()}
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside - nodes
    ]
    if not names:
        return []
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()  # as get_peft_model has it
    return trained
