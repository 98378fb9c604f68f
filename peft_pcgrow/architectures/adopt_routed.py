"""Routed experts of the architectures that transformers does not mark: how each block is brought to the contract.

What is known of each architecture is here and nowhere else. Blocks and experts change class only: parameters, their
names and the bits of what is computed stay. Shapes: T tokens, K experts per token, E experts, H hidden, I intermediate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_pcgrow.architectures.adopted_experts import (
    AdoptedBlock,
    AdoptedExperts,
    adopt_block,
    differ,
    return_block,
    tried,
)
from peft_pcgrow.architectures.decoder import UNPATCHED
from peft_pcgrow.architectures.host import EXPERTS_MARK, LIGER, block_class, loaded
from peft_pcgrow.architectures.node_weights import why_computed
from peft_pcgrow.architectures.plain_weight import loaded_quantized, way_out, why_not_plain

# blocks whose experts cannot be nodes, by their class's name in `host.BLOCKS`, and why
REFUSED = {
    "DogeCDMoE": (
        "its experts are single rows of two embeddings behind product keys, which have no matrices to grow, and its "
        "shared MLP is computed inside the same code"
    ),
    "SwitchTransformersSparseMLP": "an encoder-decoder has two lists of layers, and only decoders alone can be grown",
    "NllbMoeSparseMLP": "an encoder-decoder has two lists of layers, and only decoders alone can be grown",
}


class RoutedExperts(AdoptedExperts):
    """Several experts, each run by the block's own products."""

    def shape(self, stack: str) -> tuple[int, ...]:
        views, axis = self.views(stack), self._axis(stack) + 1
        outputs = sum(view.shape[axis] for view in views)
        return (*views[0].shape[:axis], outputs, *views[0].shape[axis + 1 :])

    @property
    def like(self) -> Tensor:
        return self.views("down_proj")[0]

    def one(self, x: Tensor, expert: int, stacks: Mapping[str, Tensor]) -> Tensor:
        entered, left = stacks["gate_up_proj"][expert], stacks["down_proj"][expert]
        if self.is_transposed:
            return self._apply_gate(x @ entered) @ left
        return linear(self._apply_gate(linear(x, entered)), left)


class OwnExperts(RoutedExperts):
    """Mixed into an experts class, of a module that is its own block: its parameters are the stacks."""

    kind, has_gate, has_bias, is_transposed = "routed", True, False, False

    @property
    def block(self) -> Any:
        return self

    def views(self, stack: str) -> list[Tensor]:
        return [getattr(self, stack)[: self.num_experts]]

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self._theirs().forward(hidden_states, top_k_index, top_k_weights)

    @property
    def stacks(self) -> Mapping[str, Tensor]:
        """Those in use, by name, where each is one tensor."""
        return self.dense or {name: self.views(name)[0] for name in self.names}

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        theirs = getattr(self._theirs(), "_apply_gate", super()._apply_gate)
        return theirs(gate_up)

    def _theirs(self) -> Any:
        """The architecture's own methods."""
        return super(AdoptedExperts, self)

    def places(self) -> list[tuple[dict[str, Any], str]]:
        return []  # the module itself

    def checkpoint(self, stack: str, values: Tensor) -> dict[str, Tensor]:
        return {stack: values.contiguous()}


class DbrxOwnExperts(OwnExperts):
    """Matrices of all experts one below the other, in a child: w1 (gate), v1 (up) and w2 `[E * I, H]`."""

    mlp: Any

    def views(self, stack: str) -> list[Tensor]:
        held = (self.mlp.w1, self.mlp.v1) if stack == "gate_up_proj" else (self.mlp.w2,)
        split = [weight.view(-1, self.ffn_hidden_size, weight.shape[-1]) for weight in held]
        return split if stack == "gate_up_proj" else [split[0].mT]

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().run(hidden_states, top_k_index, top_k_weights).view(hidden_states.shape)

    def one(self, x: Tensor, expert: int, stacks: Mapping[str, Tensor]) -> Tensor:
        gate, up = stacks["gate_up_proj"][expert].chunk(2)
        inner = self.act_fn(x.matmul(gate.T)) * x.matmul(up.T)
        # laid out as w2 is: products round differently with another layout
        return inner.matmul(stacks["down_proj"][expert].mT.contiguous())

    def places(self) -> list[tuple[dict[str, Any], str]]:
        return [(self._modules, "mlp")]

    def checkpoint(self, stack: str, values: Tensor) -> dict[str, Tensor]:
        if stack == "down_proj":
            return {"mlp.w2": values.mT.flatten(0, 1).contiguous()}
        return {f"mlp.{name}": part.flatten(0, 1) for name, part in zip(("w1", "v1"), values.chunk(2, 1), strict=True)}


class DbrxBlock(AdoptedBlock):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight, index = self.route_tokens_to_experts(self.router(hidden_states))
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.experts(flat, index, weight).view(hidden_states.shape)


class JetMoeExperts(RoutedExperts):
    """Rows sorted by expert, one product for each expert, the activation of all rows at once."""

    implementation = "sorted"

    def views(self, stack: str) -> list[Tensor]:
        return [(self.block.input_linear if stack == "gate_up_proj" else self.block.output_linear).weight]

    def linear(self, x: Tensor, chosen: Tensor, stack: str) -> Tensor:
        """The product of rows `x [R, I]` with the matrices of their experts `chosen [R]`, ascending, `[R, O]`."""
        weights = self.views(stack)[0] if self.dense is None else self.dense[stack]
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        return torch.cat([linear(rows, weights[e]) for e, rows in enumerate(x.split(counts))])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen, order = torch.sort(top_k_index.reshape(-1))
        token = order // top_k_index.shape[1]
        inner = self._apply_gate(self.linear(hidden_states[token], chosen, "gate_up_proj"))
        y = self.linear(inner, chosen, "down_proj") * top_k_weights.reshape(-1)[order].unsqueeze(1)
        return y.new_zeros(hidden_states.shape).index_add(0, token, y)

    def places(self) -> list[tuple[dict[str, Any], str]]:
        return [(self.block._modules, name) for name in ("input_linear", "output_linear")]

    def checkpoint(self, stack: str, values: Tensor) -> dict[str, Tensor]:
        return {f"{'input' if stack == 'gate_up_proj' else 'output'}_linear.weight": values.contiguous()}


class JetMoeBlock(AdoptedBlock):
    def forward(self: Any, layer_input: Tensor) -> Tensor:
        flat = layer_input.reshape(-1, layer_input.shape[-1])
        order, _, weight, counts, _ = self.router(flat)
        # the router gives rows sorted by expert: back to the tokens' order
        place = torch.argsort(order)
        every = torch.arange(len(counts), device=flat.device)
        index = torch.repeat_interleave(every, torch.tensor(counts, device=flat.device))[place]
        y = self.experts(flat, index.view(len(flat), -1), weight[place].view(len(flat), -1))
        return y.view(layer_input.shape) + self.bias


class Llama4OwnExperts(OwnExperts):
    """Every expert sees all tokens, as zeros where they are not its own, in one batched product."""

    implementation, is_transposed = "spread", True

    def spread(self, x: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
        """The outputs of `rows [N]` among `x [R, H]`, of the experts `chosen [N]`, `[N, H]`."""
        # not fewer rows than the block hands over: products round differently with another number of them
        spread = x.new_zeros(self.num_experts, *x.shape)
        spread[chosen, rows] = x[rows]
        inner = self._apply_gate(torch.bmm(spread, self.stacks["gate_up_proj"]))
        return torch.bmm(inner, self.stacks["down_proj"])[chosen, rows]

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        every = torch.arange(len(hidden_states), device=hidden_states.device)
        return self.spread(hidden_states, every, top_k_index[:, 0]) * top_k_weights


class Llama4Block(AdoptedBlock):
    """Tokens are scaled before their expert, not after it: experts are handed scaled tokens, at weight 1."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden_states)
        index = torch.topk(logits, self.top_k, dim=1).indices
        scaled = hidden_states * scores.gather(1, index)
        routed = self.experts(scaled, index, torch.ones_like(scaled[:, :1]))
        out = self.shared_expert(hidden_states)
        out.add_(routed)
        return out, logits


class LongcatOwnExperts(OwnExperts):
    zero_expert_num: int

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # their own code cannot deal with one expert for a token
        return self.looped(hidden_states, top_k_index, top_k_weights, self.stacks)

    def checkpoint(self, stack: str, values: Tensor) -> dict[str, Tensor]:
        # one of the stacks also has rows for what is no node
        more = self.zero_expert_num if stack == "gate_up_proj" else 0
        return {stack: torch.cat([values, values.new_zeros(more, *values.shape[1:])])}


class LongcatBlock(AdoptedBlock):
    """The last of the experts that its router knows hand tokens on as they are: no nodes."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        _, weight, index = self.router(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        nodes = self.config.n_routed_experts
        handed_on = index >= nodes
        y = self.experts(flat, index.clamp(max=nodes), weight.masked_fill(handed_on, 0))
        y = y.clone()  # whoever watches the experts has the other one
        # added last, in ascending order, as the experts' own code does
        for expert in torch.unique(index[handed_on]).tolist():
            choice, token = torch.where(index.mT == expert)
            y.index_add_(0, token, (flat[token] * weight[token, choice, None]).to(y.dtype))
        return y.view(hidden_states.shape)


@dataclass(frozen=True)
class Foreign:
    """How a block is adopted.

    Attributes:
        block: its new forward.
        experts: mixed into the class of its child `experts`; what becomes that child, if it has none.
        count: name, in the experts or else in the block, of how many there are. act_fn: likewise.
        single: whether only one expert for a token can be dealt with.
        weights: names in the block of what holds the experts' weights.
    """

    block: type
    experts: type
    count: str = "num_experts"
    act_fn: str = "act_fn"
    single: bool = False
    weights: tuple[str, ...] = ("experts",)


# by the name of the block's class in `host.BLOCKS`
FOREIGN = {
    "DbrxFFN": Foreign(DbrxBlock, DbrxOwnExperts, act_fn="mlp.activation_fn"),
    "JetMoeMoE": Foreign(
        *(JetMoeBlock, JetMoeExperts, "router.num_experts", "activation"), weights=("input_linear", "output_linear")
    ),
    "Llama4TextMoe": Foreign(Llama4Block, Llama4OwnExperts, single=True),
    "LongcatFlashMoE": Foreign(LongcatBlock, LongcatOwnExperts, count="num_routed_experts"),
    # follows the contract, and lacks the mark only
    "Step3p7SparseMoeBlock": Foreign(AdoptedBlock, OwnExperts),
}


def adopt_routed(model: nn.Module) -> None:
    """Adopt every block of a model that `FOREIGN` knows.

    Raises:
        ValueError: a block that hands a token to more experts than can be dealt with, has no plain weights, or does
            something else than it did in the transformers that this was written for; no block has changed then.
    """
    config, seen = getattr(model, "config", None), set()
    known = {block_class(name): how for name, how in FOREIGN.items()}
    for name, block in list(model.named_modules()):
        how = known.get(type(block))
        if how is None or _is_marked(block):
            continue
        chosen: Any = block.top_k if how.single else 1
        if chosen > 1:
            raise ValueError(
                f"{name} ({type(block).__name__}) hands each token to {chosen} experts, scaled differently for "
                "each of them; only num_experts_per_tok=1 can be grown: use LoRA on this model"
            )
        if (why := _why_not_weights(block, how, config)) is not None:
            raise ValueError(f"the experts of {name} ({type(block).__name__}) {why}")
        # the others of its class run the same code
        before = None if type(block) in seen else _tried(block)
        seen.add(type(block))
        _adopt(block, how, config)
        if before is not None and differ(before, _tried(block)):
            return_block(block)
            raise ValueError(
                f"{name} ({type(block).__name__}) computes something else in this version of transformers than "
                "peft_pcgrow expects, so its experts cannot be grown: use LoRA on them"
            )


def why_refused(model: nn.Module) -> str | None:
    """What is known of a model's experts that cannot be nodes."""
    kinds = {type(module) for module in model.modules()}
    return next((f"{name}: {reason}" for name, reason in REFUSED.items() if block_class(name) in kinds), None)


def undecorated(modules: Mapping[str, nn.Module]) -> list[str]:
    """Classes that call themselves experts and do not follow the contract."""
    # those around experts call themselves alike
    named = {
        type(m).__name__ for m in modules.values() if not (isinstance(m, AdoptedExperts) or hasattr(m, "base_layer"))
    }
    return sorted(name for name in named if "expert" in name.lower() or name.lower().endswith("moe"))


def why_none(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """Why a model has no routed experts that can be nodes."""
    named = type(model).__name__
    if (reason := why_refused(model)) is not None:
        return f"the experts of {named} cannot be nodes ({reason}): use LoRA on this model"
    others = undecorated(modules)
    config = getattr(model, "config", None)
    if others and loaded_quantized(config):
        return (
            f"{named} was loaded quantized, and its experts ({', '.join(others)}) are not transformers' own: "
            f"{way_out(config)}"
        )
    if any(isinstance(module, loaded(LIGER)) for module in modules.values()):
        return f"{named} was made with Liger's experts, whose kernels know nothing of grown ones: {UNPATCHED}"
    if others:
        return (
            f"{named} has experts ({', '.join(others)}) that do not follow transformers' experts contract "
            "(use_experts_implementation), so nodes cannot be told apart there; use LoRA on this model, or a "
            "transformers version that decorates it"
        )
    return (
        f"{named} has no mixture-of-experts layers (Qwen3-MoE, OLMoE, Mixtral, DeepSeek-V3, gpt-oss, ... do): to grow "
        "its MLPs, ask for nodes='dense'"
    )


def _adopt(block: Any, how: Foreign, config: Any) -> None:
    if not issubclass(how.experts, OwnExperts):
        count, act_fn = attrgetter(how.count)(block), attrgetter(how.act_fn)(block)
        adopt_block(block, how.block, how.experts(block, count, act_fn, config))
        return
    held = _innermost(block.experts)
    count, act_fn = attrgetter(how.count)(held), attrgetter(how.act_fn)(held)
    setattr(held, EXPERTS_MARK, False)
    held.num_experts, held.act_fn, held.config = count, act_fn, config
    adopt_block(held, how.experts)
    adopt_block(block, how.block)


def _why_not_weights(block: nn.Module, how: Foreign, config: Any) -> str | None:
    for name in how.weights:
        held = _innermost(block.get_submodule(name))
        if isinstance(held, nn.ModuleList):
            return f"were taken apart by a quantizer. Instead, {way_out(config)}"
        stacks = ("weight", "gate_up_proj", "down_proj")
        if (what := why_computed(held, stacks)) is not None:
            return f"are not their weights alone: of {name}, {what}"
        for label, parameter in held.named_parameters():
            if (what := why_not_plain(parameter)) is not None:
                return f"hold no plain weights: {name}.{label} is {what}. Instead, {way_out(config)}"
    return None


def _innermost(module: Any) -> Any:
    """Without the wrappers of adapters."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _is_marked(block: nn.Module) -> bool:
    """Whether this transformers has marked its experts itself."""
    held = getattr(block, "experts", None)
    return held is not None and EXPERTS_MARK in _innermost(held).__dict__


def _tried(block: Any) -> Any:
    router = block.router if hasattr(block, "router") else block.gate
    # experts are most of it
    like = max(block.parameters(), key=lambda parameter: parameter.numel())
    found = tried(block, next(router.parameters()).shape[-1], like)
    return found[0] if isinstance(found, tuple) and found else found
