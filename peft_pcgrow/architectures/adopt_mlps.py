"""MLPs of linear layers, which are nodes without following the experts contract: which there are, and how each is to be
adopted.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from peft_pcgrow.architectures.adopted_experts import AdoptedBlock, kind_of
from peft_pcgrow.architectures.adoption import Adoption, Change
from peft_pcgrow.architectures.decoder import UNPATCHED, decoder_layers
from peft_pcgrow.architectures.host import EXPERTS_MARK, HOOK, Conv1D
from peft_pcgrow.architectures.linear_experts import LinearBlock, LinearExperts, linear_sizes
from peft_pcgrow.architectures.node_weights import why_computed, why_hooked, why_own_forward
from peft_pcgrow.architectures.plain_weight import way_out, why_not_linear

# names that architectures give an MLP's linear layers: those that tokens enter, the one that they leave by
LINEARS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("gate_up_proj",), "down_proj"),
    (("input_linear",), "output_linear"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "hidden_act")
# what is in a child of a decoder layer with these in its name serves another end
NO_MLPS = ("norm", "attn", "attention", "router")
DROPOUTS = ("dropout", "resid_dropout")


def marked(modules: Mapping[str, nn.Module], kind: str) -> dict[str, Any]:
    """The experts modules of a kind."""
    return {
        name: module for name, module in modules.items() if EXPERTS_MARK in module.__dict__ and kind_of(module) == kind
    }


def plain_mlps(
    model: nn.Module, modules: Mapping[str, nn.Module], nodes: str, routed: Iterable[str]
) -> dict[str, Adoption]:
    """The MLPs that are nodes of a kind and are not adopted yet, by the names that their experts will have.

    Args:
        nodes: "dense": of layers without routed experts; "shared": those beside routed experts.
        routed: names of the model's routed experts.

    Raises:
        ValueError: there are none, or some that look like one and cannot be.
    """
    named, config = type(model).__name__, getattr(model, "config", None)
    path = decoder_layers(model, modules)
    if path is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{named} has no list of decoder layers, whose MLPs could be grown: use LoRA on this model")
    layers: Any = modules[path]
    prefix = f"{path}." if path else ""
    inside = {name.removeprefix(prefix).split(".")[0] for name in routed}
    found: dict[str, Adoption] = {}
    seen: set[nn.Module] = set()
    refused = []
    for index, layer in enumerate(layers):
        if (str(index) in inside) != (nodes == "shared"):
            continue
        for name, block, (entering, leaving) in _mlps(layer):
            made = _why_not_linears(block, (*entering, leaving), config)
            if made is None and not isinstance(block, AdoptedBlock) and block not in seen:
                made = _adoption(block, entering, leaving, config, nodes)
            seen.add(block)
            if isinstance(made, str):
                refused.append(f"{name} of layer {index} ({type(block).__name__}) {made}")
            elif made is not None:
                found[f"{prefix}{index}.{name}.experts"] = made
    if refused or not (found or marked(modules, nodes)):
        known = "beside" if nodes == "shared" else "without"
        reasons = "; ".join(refused[:2]) or f"no MLP of linear layers was found in layers {known} routed experts"
        if not refused and getattr(config, "quantization_config", None) is not None:
            reasons += f", maybe for a quantizer that replaced them: {way_out(config)}"
        raise ValueError(f"{named} has no {nodes} nodes that can be grown: {reasons}. Use LoRA on them")
    return found


def _mlps(layer: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[tuple[str, ...], str]]]:
    """Blocks that own an MLP's linear layers, those inside other experts, routers, norms and attention excepted."""
    for name, block in layer.named_modules():
        children, parts = dict(block.named_children()), name.split(".")
        if block is layer or any(part.isdigit() or part == "gate" for part in parts):
            continue
        if any(word in part for part in parts for word in NO_MLPS):
            continue
        for entering, leaving in LINEARS:
            if all(_is_linear(children.get(each)) for each in (*entering, leaving)):
                yield name, block, (entering, leaving)
                break


def _is_linear(module: nn.Module | None) -> bool:
    """Also by bitsandbytes, whose layers are subclasses, or in the wrapper of another adapter."""
    return isinstance(getattr(module, "base_layer", module), (nn.Linear, Conv1D))


def _adoption(block: Any, entering: tuple[str, ...], leaving: str, config: Any, kind: str) -> Adoption | str:
    """How an MLP is adopted, or why it cannot be."""
    act_fn = next((getattr(block, name) for name in ACTIVATIONS if callable(getattr(block, name, None))), None)
    # none of its own: most that write it out gate by silu, and whether this one does is tried
    act_fn = act_fn or nn.functional.silu
    if "forward" in block.__dict__ and not hasattr(block, HOOK):
        return f"has its forward replaced, by a hub kernel for example: {UNPATCHED}"
    layers = [getattr(block, name) for name in (*entering, leaving)]
    if len({getattr(layer, "bias", None) is None for layer in layers}) > 1:
        return "has biases in some of its linear layers only"
    outputs, inputs = linear_sizes(layers[0])[0], linear_sizes(layers[-1])[1]
    gated = len(entering) == 2 or outputs == 2 * inputs
    if not gated and outputs != inputs:
        return f"has linear layers of {outputs} outputs and {inputs} inputs, one after the other"
    final = _dropout(block)
    if any(isinstance(m, nn.Dropout) and m.p and name != final for name, m in block.named_modules()):
        return "drops something out between its linear layers"
    experts = LinearExperts(block, entering, leaving, gated, isinstance(layers[0], Conv1D), act_fn, config, kind)
    attributes = {"leaving": leaving, "applied_last": final, "experts": experts}
    adoption = Adoption(Change(block, LinearBlock, attributes))
    if adoption.differs(experts.shape("down_proj")[2 if experts.is_transposed else 1], experts.like):
        return "computes something else than its linear layers and activation do"
    return adoption


def _why_not_linears(block: nn.Module, names: tuple[str, ...], config: Any) -> str | None:
    if any(hasattr(getattr(block, name), "base_layer") for name in names):
        # a bank is made of the weights alone, and would compute without it
        return "has another adapter on its linear layers: leave them out of its targets"
    for name in names:
        layer: Any = getattr(block, name)
        if (why := why_not_linear(layer)) is not None:
            return f"has linear layers that {why}: {way_out(config)}"
        if (why := why_computed(layer, ("weight", "bias")) or why_hooked(layer) or why_own_forward(layer)) is not None:
            return f"has linear layers that are not their weights alone: of {name}, {why}"
    return None


def _dropout(block: nn.Module) -> str | None:
    """Name of the dropout module at the end, if there is one."""
    return next((name for name in DROPOUTS if isinstance(getattr(block, name, None), nn.Dropout)), None)
