"""What deepening could remove: the part of an error that a change of the node's weights would take away.

Error mass counts every token's error, also what no weight change removes because tokens pull in different directions.
The loss decrease that a step W - eta D buys is, to first order, eta <G, D>, with G the gradient of the mean loss.
Muon's step is the one that buys most at unit spectral norm: D = U V^T of G = U S V^T, and the decrease is the nuclear
norm of G (Bernstein & Newhouse 2024, arXiv:2409.20325). Measured on the corpus that D was taken from, it also counts
noise, which always agrees with itself. So the corpus is cut into folds, and the step taken from all folds but one is
tried on that one:

    removable = mean_f <G_f, polar(sum_{g != f} G_g)>

Noise in one fold is independent of the others' and drops out; the folds' spread gives the standard error. Shapes: F
folds, L layers, E experts, M matrices of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_pcgrow.locus import RESOLUTIONS

# singular values below this share of the largest have no direction worth keeping
CUTOFF = 1e-6
# Student's t for a two-sided 95 % interval, by degrees of freedom
T95 = (float("inf"), 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)


@dataclass(frozen=True)
class Removable:
    """Expected decrease of the mean loss if a part alone took a step of unit spectral norm (Muon's lr = 1).

    Attributes:
        estimate: `[L, E]` (resolution "expert") or `[L, E, M]` ("matrix", in the order of `names`); nats per label
            token. May be below zero, where folds disagree.
        error: standard error of it, same shape; infinite with fewer than two folds.
        parameters: of each part, broadcastable to `estimate`.
        names: the matrices of resolution "matrix".
        folds: how many folds it rests on.
    """

    estimate: Tensor
    error: Tensor
    parameters: Tensor
    names: tuple[str, ...] = ()
    folds: int = 0

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """Bounds of a 95 % confidence interval (Student's t over the folds)."""
        half = T95[min(max(self.folds - 1, 0), len(T95) - 1)] * self.error
        return self.estimate - half, self.estimate + half

    @property
    def density(self) -> Tensor:
        """Decrease per parameter."""
        return self.estimate / self.parameters


def polar(matrices: Tensor) -> Tensor:
    """U V^T of each matrix's singular value decomposition, `[..., a, b]`; zero where the matrix is.

    Through the eigenvectors of the smaller Gram matrix, in fp64: much faster than a decomposition of many thin
        matrices.
    """
    x = matrices.double()
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    largest = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    # of the Gram matrix, so the square of the cutoff
    inverse = torch.where(values > CUTOFF**2 * largest, values.clamp_min(1e-300).rsqrt(), 0.0)
    orthogonal = (vectors * inverse[..., None, :]) @ (vectors.mT @ wide)
    return orthogonal if x.shape[-2] <= x.shape[-1] else orthogonal.mT


def cross_fitted(folds: Tensor, labels: Tensor) -> Tensor:
    """What each fold says of the step taken from the others, nats per label token.

    Args:
        folds: gradients of summed losses, `[F, ..., a, b]`. labels: label tokens of each fold, `[F]`.

    Returns:
        `[F', ...]`, one for each of the F' folds that hold labels. A single fold is asked about itself.
    """
    used = labels.nonzero().flatten().tolist()
    total, found = folds[used].sum(dim=0), []
    for fold in used:
        others = total - folds[fold] if len(used) > 1 else total
        found.append((folds[fold].double() * polar(others)).sum(dim=(-1, -2)) / float(labels[fold]))
    return torch.stack(found)


def removable(
    gradient: Mapping[str, Tensor],
    labels: Tensor,
    sizes: Mapping[str, Sequence[int]],
    resolution: str = "expert",
) -> Removable:
    """What deepening could remove at every expert or matrix.

    Args:
        gradient: fold sums of each stack's gradient, or a sketch of it along the hidden axis, `[F, L, E, a, b]`.
        labels: label tokens of each fold, `[F]`. sizes: true shape of each stack's slices.
        resolution: "expert", or "matrix" (a matrix and its bias).

    Raises:
        ValueError: unknown resolution.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"unknown resolution {resolution!r}; choose from {', '.join(RESOLUTIONS)}")
    parts: dict[str, Tensor] = {}
    parameters: dict[str, int] = {}
    for name, folds in gradient.items():
        count = torch.Size(sizes[name]).numel()
        share = _per_fold(folds, labels)
        # a bias goes with its matrix
        part = name.removesuffix("_bias") if resolution == "matrix" else "all"
        parts[part] = parts[part] + share if part in parts else share
        parameters[part] = parameters.get(part, 0) + count
    names = tuple(parts)
    per_fold = torch.stack([parts[name] for name in names], dim=-1) if resolution == "matrix" else parts["all"]
    sizes_of = torch.tensor([parameters[name] for name in names], dtype=torch.float64, device="cpu")
    folds_used = per_fold.shape[0]
    spread = per_fold.std(dim=0) / folds_used**0.5 if folds_used > 1 else torch.full_like(per_fold[0], float("inf"))
    return Removable(
        estimate=per_fold.mean(dim=0),
        error=spread,
        parameters=sizes_of if resolution == "matrix" else sizes_of[0],
        names=names if resolution == "matrix" else (),
        folds=folds_used,
    )


def coherent(gradient: Mapping[str, Tensor]) -> Tensor:
    """Norm of the summed gradient of every expert, `[L, E]` fp64; `gradient` as for `removable`, not empty."""
    squares = [folds.double().sum(dim=0).square().sum(dim=(-1, -2)) for folds in gradient.values()]
    return torch.stack(squares, dim=-1).sum(dim=-1).sqrt()


def _per_fold(folds: Tensor, labels: Tensor) -> Tensor:
    # a layer at a time: the decompositions of all of a large model would not fit
    return torch.stack([cross_fitted(folds[:, layer], labels) for layer in range(folds.shape[1])], dim=1)
