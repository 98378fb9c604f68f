"""Relax: carry the error down all layers at once, hop by hop, until it has settled.

With predictions and Jacobians held at the forward values, the errors at the layers' outputs solve a triangular system.
Its Jacobi iteration, with the residual stream's identity solved exactly, is

    delta^(0)_l = delta_L        delta^(t)_l = delta_L + sum_{k>=l} (dg_k/dx at x_k)^T delta^(t-1)_{k+1}

After t hops the top t layers have passed on exact errors, so at most L hops reach what one top-down sweep finds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_pcgrow.settling.layer_run import LayerRun


def relax(runs: Sequence[tuple[LayerRun, Tensor]], delta: Tensor, tol: float) -> tuple[list[Tensor], list[Tensor]]:
    """Hop until each token's error at each layer has settled, and the errors of all tokens together: changed by at most
    `tol` of their norm, or are exact.

    Args:
        runs: N consecutive layers up to the top one, bottom first, with their stored inputs `[B, S, H]`.
        delta: error at the top output, `[B, S, H]`.

    Returns:
        Errors `[B, S, H]` at the N outputs, bottom first, in fp32 at least. And for each output the first hop,
        `[B * S]` of 1 to N, at which a token's error changed by at most `tol` of its norm.
    """
    total = len(runs)
    # errors of 8 bits of mantissa would not settle
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    errors = [delta] * total
    hops = [torch.zeros(delta.shape[:-1].numel(), dtype=torch.long, device=delta.device) for _ in errors]
    for hop in range(1, total):
        # the errors above are exact already, and so is what they send down
        exact = total - hop
        old = new = errors[exact]
        moving = False
        for place in range(exact - 1, -1, -1):
            branch = _through_branch(*runs[place + 1], old)
            new = new.to(branch.device) + branch
            old, errors[place] = errors[place].to(branch.device), new
            change, norm = (new - old).norm(dim=-1).flatten(), new.norm(dim=-1).flatten()
            count = hops[place] = hops[place].to(branch.device)
            count[(count == 0) & (change <= tol * norm)] = hop
            moving |= not bool(count.all()) or not bool(change.norm() <= tol * norm.norm())
        if not moving:
            break
    for place, count in enumerate(hops):
        # an exact error does not change at the hop after
        count[count == 0] = total - place
    return errors, hops


def _through_branch(run: LayerRun, stored: Tensor, error: Tensor) -> Tensor:
    """`(dg/dx)^T error`: what a layer adds to the error that passes it by."""
    with torch.enable_grad():
        x = stored.detach().requires_grad_()
        output = run.again(x)[0]
    passed = error.to(output.device, output.dtype)
    (below,) = torch.autograd.grad(output, [x], passed)
    return below.to(error.dtype) - passed.to(below.device, error.dtype)
