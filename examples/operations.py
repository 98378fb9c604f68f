"""What must hold on every architecture, one function per operation: see `conformance.py`.

Each is checked against something that does not use this package: autograd through the untouched model, the untouched
model's own logits, hooks on its experts, a plain model that the adapter was merged into.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from architectures import EXPERTS, VOCABULARY, build, exact_dtype
from checks import Departure, check, check_close, check_same
from peft_pcgrow import ErrorMap, PCGrowConfig, find_experts, measure_errors
from peft_pcgrow.architectures.find import adopt

# experts grown at every layer that has any
GROWN = [1, 4, 6]
# first and last word of the texts to grow on, and of those that must not change
DOMAIN_WORDS, RETAIN_WORDS = (3, 60), (61, VOCABULARY - 1)
# relative root-mean-square error allowed: gradients in fp64 and fp32, and logits of merged weights in fp32. Two ways to
# add up in fp32 differ by as much as either is off: gemma4_text's own gradients by autograd are 4e-5 from those in fp64
GRADIENT = {torch.float64: 1e-11, torch.float32: 5e-5}
MERGED = 1e-5
PROMPT, NEW = 10, 8


def words(first: int, last: int, batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(first, last + 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokens(batch: int = 4, length: int = 16, seed: int = 0) -> Tensor:
    return words(3, VOCABULARY - 1, batch, length, seed)


def domain(batch: int = 8, length: int = 24, seed: int = 0) -> Tensor:
    return words(*DOMAIN_WORDS, batch, length, 2 * seed)


def retain(batch: int = 8, length: int = 24, seed: int = 0) -> Tensor:
    return words(*RETAIN_WORDS, batch, length, 2 * seed + 1)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model: nn.Module, steps: int = 2, texts: Callable[..., Tensor] = tokens) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)
    model.train()
    for step in range(steps):
        ids = texts(seed=1 + step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def locus(model: nn.Module) -> dict[int, list[int]]:
    return {site.layer: GROWN for site in find_experts(model).sites}


def grown(model: nn.Module, **config) -> Any:
    return get_peft_model(model, PCGrowConfig(locus=locus(model), **config))


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    torch.manual_seed(0)  # some architectures draw noise in training
    return model.train()(input_ids=ids, labels=ids).loss


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Of all that trains, by name."""
    language_loss(model, ids).backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in named.items() if p.grad is None]
    check(not missing, f"no gradient for {', '.join(missing[:3])}")
    return {name: p.grad for name, p in named.items() if p.grad is not None}


# ---- operations: each takes an architecture's name and returns a note


def _holds_experts(path: str, module: nn.Module) -> bool:
    return type(module).__name__.lower().endswith(("experts", "cdmoe")) and "shared" not in path


def discover(name: str) -> str:
    """Every decoder layer that has experts is found, at its index, and no experts of anything else."""
    model = build(name)
    decoder = model.get_decoder()
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=lambda held: len(list(held.modules())))
    want = [i for i, layer in enumerate(layers) if any(_holds_experts(*held) for held in layer.named_modules())]
    check(bool(want), "no layer has experts: the miniature is wrong")
    tree = adopt(find_experts(model))
    check(list(tree.layers) == list(layers), f"{len(tree.layers)} decoder layers found, the decoder has {len(layers)}")
    found = [site.layer for site in tree.sites]
    check(found == want, f"experts found at layers {found}, expected {want}")
    for site in tree.sites:
        check(any(m is site.base for m in layers[site.layer].modules()), f"{site.name} is not in layer {site.layer}")
    return ""


def routed(model: nn.Module, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """What each layer's experts were called with, and the error at their output, by one graph through the model."""
    seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def keep(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            output.retain_grad()
            # some architectures run through layers several times
            seen.setdefault(layer, []).append((args[1], args[2], output))

        return hook

    for site in adopt(find_experts(model)).sites:
        site.module.register_forward_hook(keep(site.layer))
    model.eval().requires_grad_(True)
    out = model(input_ids=ids, use_cache=False).logits[:, :-1]
    cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for layer, calls in seen.items():
        index, weight, errors = zip(*((index, weight, output.grad) for index, weight, output in calls), strict=True)
        found[layer] = torch.cat(index), torch.cat(weight), torch.cat(errors)
    return found


def rounding(model: nn.Module, ids: Tensor) -> float:
    """How exact autograd itself is where an architecture rounds to fp32 on the way: largest relative difference that
    three times the loss makes to a third of the experts' gradients."""
    found: list[dict[str, Tensor]] = []
    for scale in (1, 3):
        twin = copy.deepcopy(model).requires_grad_(True)
        (scale * language_loss(twin, ids)).backward()
        held = [p for site in find_experts(twin).sites for p in site.base.parameters()]
        found.append({str(i): p.grad / scale for i, p in enumerate(held) if p.grad is not None})
    return max(float((found[1][i] - want).norm() / want.norm()) for i, want in found[0].items() if want.any())


def exactly(run: Callable[[float], None], name: str) -> str:
    """`run(allowed)` at the tolerance for fp64, or at what the architecture's own rounding leaves; then says so."""
    dtype = exact_dtype(name)
    try:
        run(GRADIENT[dtype])
    except Departure as departure:
        floor = rounding(build(name, dtype), tokens())
        if 4 * floor <= GRADIENT[dtype]:
            raise
        run(4 * floor)
        return f"{departure}; the architecture rounds to fp32 on the way, by {floor:.0e}"
    return ""


def measure(name: str, dtype: torch.dtype, implementation: str, allowed: float) -> None:
    ids = tokens()
    emap = measure_errors(build(name, dtype, implementation), [ids], progress=False)
    seen = routed(build(name, dtype, implementation), ids)
    check(set(emap.layers) == set(seen), f"layers {list(emap.layers)} measured, {sorted(seen)} called")
    for row, layer in enumerate(emap.layers):
        index, weight, error = seen[layer]
        # some routers choose beyond the experts, or the first one at weight 0, for tokens that need none
        count = torch.bincount(index[weight != 0], minlength=EXPERTS)[:EXPERTS]
        check_same(emap.count[row].long(), count, f"rows at layer {layer}")
        norms = (weight.abs() * error.norm(dim=-1, keepdim=True)).double()
        mass = torch.zeros(int(index.max()) + EXPERTS, dtype=torch.float64)
        mass = mass.index_add(0, index.flatten(), norms.flatten())[:EXPERTS]
        check(bool(mass.any()), f"no error at layer {layer}")
        check_close(emap.mass[row], mass, allowed, f"error mass at layer {layer}")


def error_map(name: str) -> str:
    """Row counts equal those that hooks on the experts see, error mass the gate-weighted norms of autograd's errors."""
    return exactly(lambda allowed: measure(name, exact_dtype(name), "eager", allowed), name)


def settle(name: str, dtype: torch.dtype, implementation: str, allowed: float) -> None:
    ids, base = tokens(), build(name, dtype, implementation)
    swept = grown(copy.deepcopy(base), settle="sweep")
    got = gradients(swept, ids)
    for label, want in gradients(grown(copy.deepcopy(base), settle="backprop"), ids).items():
        check_close(got[label], want, allowed, f"{label} against backprop")
    # the oracle that knows nothing of settling: the base's own stacks. With its gradients in the place of its weights,
    # a bank, which copies what it grows, holds their slices in its own layout, whatever the architecture calls them
    own = build(name, dtype, implementation).requires_grad_(True)
    language_loss(own, ids).backward()
    for parameter in own.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    sites = zip(find_experts(swept).sites, find_experts(grown(own)).sites, strict=True)
    for site, image in sites:
        for stack, parameter in site.module.bank("default").items():
            label, want = f"{stack} of layer {site.layer}", image.module.bank("default")[stack].detach()
            check(bool(want.any()), f"autograd has no gradient for {label}")
            check_close(parameter.grad, want, allowed, f"{label} against the base's own")


def sweep(name: str) -> str:
    """Gradients of the banks equal autograd's."""
    return exactly(lambda allowed: settle(name, exact_dtype(name), "eager", allowed), name)


def grouped_mm(name: str) -> str:
    """The same and the error map, in fp32 by transformers' fast path."""
    measure(name, torch.float32, "grouped_mm", GRADIENT[torch.float32])
    settle(name, torch.float32, "grouped_mm", GRADIENT[torch.float32])
    return ""


@lru_cache(maxsize=2)
def contrast(name: str) -> ErrorMap:
    texts = [domain(32, seed=1), domain(32, seed=2)], [retain(32, seed=1), retain(32, seed=2)]
    return measure_errors(build(name), texts[0], retain=texts[1], window=8, gradients=False, progress=False)


def spawned(name: str, dtype: torch.dtype = torch.float32, **changes) -> Any:
    base = build(name, dtype, **changes)
    config = PCGrowConfig(error_map=contrast(name), locus=locus(base), grow="spawn", gate_fpr=0.2)
    return get_peft_model(base, config)


def spawn(name: str) -> str:
    """At birth the base's bits; after training, other logits from the same base, to the bit."""
    base, ids = build(name), torch.cat([domain(4), retain(4)])
    plain = logits(base, ids)
    model = spawned(name)
    check_same(logits(model, ids), plain, "logits at birth")
    before = snapshot(base)
    train(model, texts=domain)
    model.set_gate_fpr(0.3)
    check(not torch.equal(logits(model, ids), plain), "no newborn took a row")
    for label, held in model.named_parameters():
        label = label.replace(".base_layer", "").removeprefix("base_model.model.")
        if label in before:
            check_same(held, before.pop(label), label)
    check(not before, f"gone from the base: {', '.join(before)}")
    with model.disable_adapter():
        check_same(logits(model, ids), plain, "logits with newborns disabled")
    return ""


LOADERS: dict[str, Callable[[Path, Path], Any]] = {
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "AutoPeftModel": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "AutoModel": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    "load_adapter": lambda base, adapter: _load(AutoModelForCausalLM.from_pretrained(base), adapter),
}


def aligned(model: Any) -> Any:
    """With every weight in memory of its own: loaded ones lie as in the file, and products round by their address."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _load(model: Any, adapter: Path) -> Any:
    model.load_adapter(adapter)
    return model


def save(name: str) -> str:
    """Every loader brings the trained adapter back, to the bit."""
    ids = tokens(seed=99)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder, "base"), Path(folder, "adapter")
        build(name).save_pretrained(base)
        model = grown(aligned(AutoModelForCausalLM.from_pretrained(base)))
        plain = logits(model, ids)
        train(model)
        model.save_pretrained(adapter)
        want = logits(model, ids)
        check(not torch.equal(want, plain), "training changed no logit")
        for loader, load in LOADERS.items():
            check_same(logits(aligned(load(base, adapter)), ids), want, f"logits by {loader}")
    return ""


def disable(name: str) -> str:
    """Switched off, a trained adapter leaves the base's bits; on again, its own."""
    ids = tokens(seed=99)
    base = build(name)
    plain = logits(base, ids)
    model = grown(base)
    train(model)
    after = logits(model, ids)
    check(not torch.equal(after, plain), "training changed no logit")
    with model.disable_adapter():
        check_same(logits(model, ids), plain, "disabled logits")
    check_same(logits(model, ids), after, "logits when enabled again")
    return ""


def merge(name: str) -> str:
    """Merged, the base computes what the adapter did; unmerged, every bit is back; unloaded, it is a plain model."""
    ids = tokens(seed=99)
    base = build(name)
    kind, keys = type(base), set(base.state_dict())
    model = grown(base)
    train(model)
    before, apart = snapshot(model), logits(model, ids)
    model.merge_adapter()
    check_close(logits(model, ids), apart, MERGED, "merged logits")
    model.unmerge_adapter()
    for label, bits in snapshot(model).items():
        check_same(bits, before[label], f"{label} after unmerging")
    check_same(logits(model, ids), apart, "unmerged logits")
    plain = model.merge_and_unload()
    check(type(plain) is kind and set(plain.state_dict()) == keys, "merge_and_unload leaves another model")
    check_close(logits(plain, ids), apart, MERGED, "logits of the merged plain model")
    return ""


@torch.no_grad()
def greedy(model: Any, prompt: Tensor) -> Tensor:
    """Word by word, each from a forward over the whole text without a cache."""
    ids = prompt
    for _ in range(NEW):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@torch.no_grad()
def cached(model: Any, prompt: Tensor) -> Tensor:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    return model.eval().generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **settings)


def _same_with_cache(model: Any, prompt: Tensor) -> bool:
    return torch.equal(cached(model, prompt), greedy(model, prompt))


def generate(name: str) -> str:
    """With a cache a grown model writes what it writes without one, and what the plain model that it merges into
    writes; so does a model with newborns, whose gates remember the text."""
    prompt, dtype = tokens(4, PROMPT, seed=7), exact_dtype(name)
    base, note, changes = build(name, dtype), "", {}
    if not _same_with_cache(base, prompt):
        # a sparse attention that chooses its keys writes the same only where it may choose them all
        changes = {"index_topk": 64}
        base = build(name, dtype, **changes)
        note = "with index_topk=64: with fewer, the base itself writes other words with a cache than without"
    exact = _same_with_cache(base, prompt)
    model = grown(base)
    train(model, steps=4)
    written = cached(model, prompt)
    check_same(written, cached(copy.deepcopy(model).merge_and_unload(), prompt), "words of the merged plain model")
    if not exact:
        return "as the merged plain model; the base itself writes other words with a cache than without"
    check_same(written, greedy(model, prompt), "words without a cache")
    newborn = spawned(name, dtype, **changes)
    train(newborn, steps=4, texts=domain)
    prompt = torch.cat([domain(3, PROMPT, seed=9), retain(3, PROMPT, seed=9)])
    check_same(cached(newborn, prompt), greedy(newborn, prompt), "words of newborns without a cache")
    return note


OPERATIONS: dict[str, Callable[[str], str]] = {
    "discover": discover,
    "map": error_map,
    "sweep": sweep,
    "grouped_mm": grouped_mm,
    "spawn": spawn,
    "save": save,
    "disable": disable,
    "merge": merge,
    "generate": generate,
}
