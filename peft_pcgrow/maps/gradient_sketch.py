"""The energy of a node and what is accumulated about it.

With delta = dLoss/d(output of the experts module), routing weight p and a row r routed to expert e, the error at
that node is

    eps_r = p_r * delta_r                    E_e = 1/2 * sum_{r in e} |eps_r|^2            (Rao & Ballard 1999)

and the pull that all rows together have on the node's weights W is the summed weight gradient

    G_e = sum_{r in e} eps_r x_r^T           coherent error = |G_e|_F

Rows that pull in different directions add to the energy but cancel in G.
"""

import torch
from torch import Tensor

from pcgrow_kernels import expert_error

__all__ = ["GradientSketch", "expert_error"]


class GradientSketch:
    """A linear image of weight gradients that is small enough to keep and to add for every node.

    `G [E, ...]` is flattened to a matrix per expert and each side longer than `dim` is multiplied by a fixed random
    matrix R with E[R^T R] = I (Johnson & Lindenstrauss 1984), so that E|sketch(G)|^2 = |G|^2. Sides of at most `dim`
    stay as they are (the norm is then exact), and so does the side of the intermediate neurons. Being linear, sketches
    of two corpora add up to that of their union.

    Args:
        dim: longest side kept exactly; the relative standard error of a norm beyond it is about `1 / sqrt(dim)`.
        seed: of the random matrices; maps add up only with equal `dim` and `seed`.
    """

    def __init__(self, dim: int, seed: int = 0):
        self.dim, self.seed = dim, seed
        self._made: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(self, gradient: Tensor, neurons: int | None = None) -> Tensor:
        """`[E, a, b]` or `[E, a]` -> fp32 or fp64 `[E, min(a, dim), min(b, dim)]` (b = 1 for a bias).

        `neurons`: the side of the intermediate neurons, 0 or 1, which keeps its length.
        """
        matrix = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        matrix = matrix.reshape(matrix.shape[0], matrix.shape[1], -1)
        if matrix.shape[1] > self.dim and neurons != 0:
            matrix = self._random(matrix.shape[1], 0, matrix) @ matrix
        if matrix.shape[2] > self.dim and neurons != 1:
            matrix = matrix @ self._random(matrix.shape[2], 1, matrix).mT
        return matrix

    def _random(self, size: int, side: int, like: Tensor) -> Tensor:
        key = (size, side, like.device)
        if key not in self._made:
            # drawn on the CPU, so that maps made on different devices add up
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 2 * size + side)
            self._made[key] = (
                torch.randn(self.dim, size, generator=generator, device="cpu").div_(self.dim**0.5).to(like.device)
            )
        return self._made[key].to(like.dtype)
