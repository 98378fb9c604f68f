"""Sums over texts that gates, and the protection of experts, are worked out from."""

import math

import torch
from torch import Tensor

from pcgrow_kernels.window_mean import totals, window_means
from peft_pcgrow.architectures import experts
from peft_pcgrow.architectures.find import Tree
from peft_pcgrow.gates.directions import MomentSketch
from peft_pcgrow.gates.gate import ENOUGH, Moments, Rows

# a gate: its kind, of `given.GATES` ("gate" reads what enters the experts, "entry" what enters the attention), and the
# row of its layer
Key = tuple[str, int]
# bytes of sums, of all gates or of one stack of all experts, up to which they stay where they are made: brought to the
# CPU with each batch they hold up a GPU
AT_HAND = 2**30


class FeatureMoments:
    """Moments of the running means of the texts that (at most) so many gates are fitted on."""

    def __init__(self, window: int, gates: int):
        self.window, self.gates = window, gates
        self.held: dict[Key, Moments] = {}

    def __call__(self, key: Key, x: Tensor, index: Tensor | None, rows: Rows, held: Tensor) -> None:
        size = x.shape[-1]
        if key not in self.held:
            self.held[key] = Moments(size, _where(4 * self.gates * size * size, x))
        moments = self.held[key]
        if bool(held.all()):
            return
        mean, n = window_means(totals(x, rows.real), x.shape[1], self.window)
        use = rows.real & (n >= n.amax(dim=1, keepdim=True).clamp_max(ENOUGH)) & ~held.to(x.device).unsqueeze(1)
        moments.add(mean[use])


def _where(size: int, x: Tensor) -> torch.device:
    """The device of sums of so many bytes."""
    return x.device if size <= AT_HAND else torch.device("cpu")


class InputMoments:
    """Second moments of what enters each stack of each expert."""

    def __init__(self, tree: Tree, sketch: MomentSketch):
        self.tree, self.sketch = tree, sketch
        self.moment: dict[str, Tensor] = {}
        self.trace: dict[str, Tensor] = {}

    def __call__(self, key: Key, x: Tensor, index: Tensor | None, rows: Rows, held: Tensor) -> None:
        if index is None:
            return
        row = key[1]
        site = self.tree.sites[row]
        tokens, chosen = x[rows.real], index[rows.real]
        for n, (_, donor) in enumerate(site.newborns):
            chosen = chosen.masked_fill(chosen == site.experts + n, donor)
        base, here = experts.part(site.base), experts.nodes_here(site.base) or range(site.experts)
        for place, expert in enumerate(here):
            mine = tokens[(chosen == expert).any(dim=1)]
            if not len(mine):
                continue
            for name, rows_in in experts.stack_inputs(base, mine, place).items():
                if name not in self.moment:
                    width = rows_in.shape[1]
                    sizes = len(self.tree.sites), site.experts, width, min(width, self.sketch.dim)
                    device = _where(4 * math.prod(sizes), x)
                    self.moment[name] = torch.zeros(sizes, device=device)
                    self.trace[name] = torch.zeros(sizes[:2], dtype=torch.float64, device=device)
                self.moment[name][row, expert] += self.sketch(rows_in).to(self.moment[name].device)
                self.trace[name][row, expert] += rows_in.double().square().sum().to(self.trace[name].device)
