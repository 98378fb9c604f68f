"""Directions in which other text enters a node, to protect them from updates.

A weight change dW moves the output for an input x by dW x: text whose inputs lie in the span of V feels nothing of a
dW with dW V = 0. V holds the main eigenvectors of the retain text's second moment at the node, sum_r x_r x_r^T, down to
a share of its trace (gradient projection memory, arXiv:2103.09762). Wide inputs keep a sketch of that moment instead,
Y = (sum_r x_r x_r^T) Omega, which is linear in the rows; its eigenvectors follow by Nystrom's approximation (Tropp et
al. 2017, algorithm 3). Shapes: N nodes, I width of the input, D columns of the sketch (I if exact), K directions.
"""

import torch
from torch import Tensor


class MomentSketch:
    """`sum_r x_r x_r^T`, whole for inputs up to `dim` wide, beyond that times a fixed random `[I, dim]` matrix."""

    def __init__(self, dim: int, seed: int = 0):
        self.dim, self.seed = dim, seed
        self._made: dict[int, Tensor] = {}

    def matrix(self, width: int) -> Tensor | None:
        """Omega, `[I, D]` with orthonormal columns; None stands for the identity."""
        if width <= self.dim:
            return None
        if width not in self._made:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + width)
            self._made[width] = torch.linalg.qr(torch.randn(width, self.dim, generator=generator, device="cpu")).Q
        return self._made[width]

    def __call__(self, x: Tensor) -> Tensor:
        """`[R, I]` -> `[I, D]` fp32."""
        x = x.float()
        omega = self.matrix(x.shape[1])
        return x.mT @ (x if omega is None else x @ omega.to(x.device))


def main_directions(moment: Tensor, trace: float, share: float, sketch: MomentSketch) -> Tensor:
    """Fewest eigenvectors of a moment that hold `share` of its trace, `[I, K]` fp32, orthonormal.

    All D that a sketch has if they hold less; none of a moment that is zero.

    Args:
        moment: `[I, D]`, from `sketch`. trace: sum_r |x_r|^2.
    """
    if not trace > 0 or not share > 0:
        return moment.new_zeros(len(moment), 0, dtype=torch.float32)
    moment = moment.double()
    omega = sketch.matrix(len(moment))
    if omega is None:
        values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
    else:
        shift = torch.finfo(torch.float32).eps * moment.norm()
        shifted = moment + shift * omega.double()
        core = omega.double().mT @ shifted
        # an eigendecomposition, because the core of few rows is singular and has no Cholesky factor
        inner, basis = torch.linalg.eigh((core + core.mT) / 2)
        root = basis / inner.clamp_min(float(shift)).sqrt()
        vectors, singular, _ = torch.linalg.svd(shifted @ root, full_matrices=False)
        values = (singular.square() - shift).clamp_min(0)
    reached = values.clamp_min(0).cumsum(0) / trace
    rank = min(int((reached < share * (1 - 1e-9)).sum()) + 1, len(values))
    return vectors[:, :rank].float()
