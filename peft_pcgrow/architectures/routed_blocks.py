"""What blocks of routed experts that transformers does not mark become when they are adopted: one pair an architecture.

What is known of how each architecture computes is here and nowhere else. Shapes: T tokens, K experts per token, E
experts, H hidden, I intermediate.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_pcgrow.architectures.adopted_experts import AdoptedBlock, AdoptedExperts


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
