"""Floating-point operations of a model, counted from the shapes of its weights.

A multiply-add is two operations. With N the parameters that multiply a token, S the tokens that it attends to, and h
heads in each of L layers, a forward takes 2 N + 2 S h (d_k + d_v) L a token (queries by keys, and their weights by
values), and a backward twice that: once towards what came in, once towards the parameters, or towards the other factor
(Kaplan et al. 2020, arXiv:2001.08361, section 2.1; attention as in Chowdhery et al. 2022, arXiv:2204.02311, appendix
B). Left out are norms, activations, softmax, the lookup of embeddings, and what optimizers do number by number. All
that a model holds is taken to be used: of one that also reads images, or routes its attention, these are upper bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import ExpertsSite, Tree

# what configs call the number of experts that a token is assigned to
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def chosen_of(config: Any) -> int | None:
    """How many experts a token is assigned to, if a config says so."""
    text = experts.text_config(config)
    return next((held for name in CHOSEN if isinstance(held := getattr(text, name, None), int)), None)


@dataclass(frozen=True)
class Shapes:
    """What the operations of a model follow from: parameters that multiply each token.

    Attributes:
        head: outside of the decoder layers.
        dense: of each decoder layer, without its experts.
        routed: of each decoder layer, in the experts that a token is assigned to.
        sides: inputs plus outputs of all these matrices, but the head's and the routers': parameters of a LoRA of rank
            1 beside each, as they are held (gate and up may be one).
        attention: h (d_k + d_v) of a layer, taken for all alike.
    """

    head: int
    dense: tuple[int, ...]
    routed: tuple[int, ...]
    sides: int
    attention: int

    @classmethod
    def of(cls, model: nn.Module, tree: Tree) -> "Shapes":
        """Of a base without adapters, and its experts."""
        sites = {site.layer: site for site in tree.sites}
        every, inside = dict.fromkeys(model.modules()), set()
        dense, routed, sides = [], [], 0
        for place, layer in enumerate(tree.layers):
            site = sites.get(place)
            mine = [module for module in layer.modules() if module in every]
            inside.update(mine)
            left_out = _experts(site)
            matrices = [shape for module in mine if module not in left_out for shape in _matrices(module)]
            dense.append(sum(map(math.prod, matrices)))
            router = [] if site is None or site.router is None else _matrices(site.router)
            sides += sum(map(sum, matrices)) - sum(map(sum, router))
            count = 0.0
            if site is not None:
                share = _chosen(model, tree, site) / site.experts
                stacks = [stack.shape for name, stack in experts.expert_stacks(site.base).items() if "bias" not in name]
                count = share * sum(map(math.prod, stacks))
                sides += int(share * sum(shape[0] * sum(shape[1:]) for shape in stacks))
            routed.append(int(count))
        head = sum(math.prod(shape) for module in every if module not in inside for shape in _matrices(module))
        return cls(head, tuple(dense), tuple(routed), sides, _attention(getattr(model, "config", None)))

    @property
    def active(self) -> int:
        """Parameters that multiply a token, N."""
        return self.head + sum(self.dense) + sum(self.routed)

    def forward(self, tokens: float, pairs: float) -> float:
        """Of a forward. pairs: for each token, those that it is multiplied with in attention: B S^2 of `[B, S]`."""
        return 2.0 * tokens * self.head + self._layers(tokens, pairs)

    def full(self, tokens: float, pairs: float) -> float:
        """Of a forward and a backward in which all parameters train."""
        return 3 * self.forward(tokens, pairs)

    def lora(self, tokens: float, pairs: float, rank: int) -> float:
        """The same where only a LoRA beside each matrix of the decoder layers trains: nothing goes towards the base's
        parameters."""
        inner = 2.0 * pairs * self.attention * len(self.dense)
        return 2 * self.forward(tokens, pairs) + inner + 6.0 * tokens * rank * self.sides

    def sweep(self, tokens: float, pairs: float, lowest: int, trained: float, again: bool = True) -> float:
        """Of a forward, and of the error's way down to the experts of decoder layer `lowest`: layers keep nothing, so
        each runs forward once more, and then backward towards what came in.

        Args:
            trained: parameters that multiply a token, on average, and have a gradient.
            again: False: layers keep their activations, as in backprop.
        """
        repeated = self._layers(tokens, pairs, lowest) if again else 0.0
        above = len(self.dense) - lowest - 1
        down = self._layers(tokens, pairs, lowest + 1) + 2.0 * pairs * self.attention * above
        return self.forward(tokens, pairs) + repeated + 2.0 * tokens * (self.head + trained) + down

    def _layers(self, tokens: float, pairs: float, lowest: int = 0) -> float:
        """Of a forward of the decoder layers from the lowest up."""
        parameters = sum(self.dense[lowest:]) + sum(self.routed[lowest:])
        return 2.0 * tokens * parameters + 2.0 * pairs * self.attention * (len(self.dense) - lowest)


def _matrices(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the matrices that a module multiplies what it is given with."""
    if isinstance(module, nn.Embedding):
        return []
    width, height = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(width, int) and isinstance(height, int):
        return [(width, height)]  # packed weights have other shapes
    return [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() > 1]


def _experts(site: ExpertsSite | None) -> set[nn.Module]:
    """The modules of a layer that hold its experts."""
    if site is None:
        return set()
    base: Any = site.base
    held = [owner.get(name) for owner, name in experts.weight_places(base)]
    holders = [base, *(module for module in held if isinstance(module, nn.Module))]
    return {inner for module in holders for inner in module.modules()}


def _chosen(model: nn.Module, tree: Tree, site: ExpertsSite) -> int:
    """How many experts a token is assigned to; all, where nothing tells."""
    if tree.nodes != "routed":
        return site.experts
    found = chosen_of(getattr(model, "config", None)) or getattr(site.router, "top_k", None)
    return min(found, site.experts) if isinstance(found, int) and found > 0 else site.experts


def _attention(config: Any) -> int:
    """h (d_k + d_v), by the names that configs have for them; 0: there are none."""
    text = experts.text_config(config)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0
    plain = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads
    if value := getattr(text, "v_head_dim", None):  # latent attention
        return heads * (getattr(text, "qk_nope_head_dim", 0) + getattr(text, "qk_rope_head_dim", 0) + value)
    return 2 * heads * plain


def orthogonalization(shape: Sequence[int], steps: int) -> float:
    """Of Newton-Schulz on a stack of matrices `[..., O, I]`: per step x x^T, its square, and that times x."""
    *count, rows, columns = shape
    least, most = sorted((rows, columns))
    return math.prod(count) * steps * (4.0 * least * least * most + 2.0 * least**3)
