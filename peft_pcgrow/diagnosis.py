"""The verdict on a corpus: covered (nothing to do), concentrated (deepen) or distributed (spawn)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# a corpus is covered if a Muon step of this size at every node would remove at most this share of its loss. Text that a
# model was trained on measured 0.3 to 0.8 %, text that it had never seen 3.6 % (see README)
COVERED_STEP, COVERED_REMOVABLE = 0.02, 0.005
# without weight gradients: below this share of a uniform guess's loss
COVERED_SHARE = 0.1
# what a node could recover is concentrated if half of it sits in at most this share of the nodes: one damaged expert
# measured 1 to 3 % of the nodes, a new domain 7 %
CONCENTRATED_RECOVERABLE = 0.05
# without weight gradients, of the error mass; a flat map needs half of the nodes
CONCENTRATED_SHARE = 0.2


@dataclass(frozen=True)
class Diagnosis:
    """A verdict and the numbers that it was decided on.

    Attributes:
        verdict: "covered" (nothing to do), "concentrated" (deepen) or "distributed" (spawn).
        loss: mean loss of the corpus, nats per label token.
        statistic: what was compared with `covered_below`, in words, and `value`, what it is.
        concentration: smallest share of all nodes that holds half of what could be recovered (without gradients: half
            of the error mass).
        concentrated_below: share up to which it counts as concentrated.
        nodes: the (layer, expert) pairs of that share, most first.
    """

    verdict: str
    loss: float
    statistic: str
    value: float
    covered_below: float
    concentration: float
    concentrated_below: float
    nodes: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.verdict}: loss {self.loss:.3f} nats/token, {self.statistic} {self.value:.3g} (covered up to "
            f"{self.covered_below:.3g}); half of it sits in {self.concentration:.1%} of the nodes (concentrated up to "
            f"{self.concentrated_below:.0%})"
        )


def judge(
    layers: tuple[int, ...],
    loss: float,
    vocabulary: int,
    mass: Tensor,
    recoverable: Tensor | None = None,
    removed: float | None = None,
    mastered: float | None = None,
    concentrated_below: float | None = None,
) -> Diagnosis:
    """Decide on a corpus.

    With weight gradients: covered if a Muon step of `COVERED_STEP` at every node removes at most `COVERED_REMOVABLE` of
    the loss, to first order. Otherwise concentrated if half of what the nodes could recover sits in at most
    `CONCENTRATED_RECOVERABLE` of them. Without: covered if the loss is at most `COVERED_SHARE` of a uniform guess's,
    concentrated if half of the error mass sits in at most `CONCENTRATED_SHARE` of the nodes.

    Args:
        layers: decoder layer of each row. loss: nats per label token. mass: error mass, `[L, E]`.
        recoverable: `[L, E]`, removable^2 / rows: at its best length a step recovers slope^2 / (2 curvature), and
            curvature grows with the node's rows.
        removed: nats per label token that a step of unit spectral norm at every node removes.
        mastered: loss of text that counts as covered, instead of the rules above.
        concentrated_below: instead of the shares above.
    """
    if recoverable is not None and removed is not None:
        statistic = f"share of it that a step of {COVERED_STEP} removes"
        value, limit = removed * COVERED_STEP / max(loss, 1e-12), COVERED_REMOVABLE
        weighed, share = recoverable, CONCENTRATED_RECOVERABLE
    else:
        statistic, value, limit = "loss", loss, COVERED_SHARE * math.log(vocabulary)
        weighed, share = mass, CONCENTRATED_SHARE
    if mastered is not None:
        statistic, value, limit = "loss", loss, mastered
    ordered, order = torch.sort(weighed.flatten(), descending=True, stable=True)
    total = ordered.sum()
    half = int((ordered.cumsum(0) < total / 2).sum()) + 1 if total > 0 else ordered.numel()
    held, experts = half / ordered.numel(), mass.shape[1]
    threshold = share if concentrated_below is None else concentrated_below
    verdict = "covered" if value <= limit else "concentrated" if held <= threshold else "distributed"
    nodes = tuple((layers[i // experts], i % experts) for i in order[:half].tolist()) if total > 0 else ()
    return Diagnosis(verdict, loss, statistic, value, limit, held, threshold, nodes)
