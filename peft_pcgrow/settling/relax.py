"""Relax: carry the error down all layers at once, hop by hop, until it has settled.

With predictions and Jacobians held at the forward values, the errors at the layers' outputs solve a triangular system.
Its Jacobi iteration, with the residual stream's identity solved exactly, is

    delta^(0)_l = delta_L        delta^(t)_l = delta_L + sum_{k>=l} (dg_k/dx at x_k)^T delta^(t-1)_{k+1}

After t hops the top t layers have passed on exact errors, so at most L hops reach what one top-down sweep finds.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peft_pcgrow.settling.layer_run import LayerRun


def relax(
    runs: Sequence[tuple[LayerRun, Tensor]],
    delta: Tensor,
    tol: float,
    needed: Iterable[int],
    every_token: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Hop until the needed errors change by at most `tol` of their norm, or are exact.

    Args:
        runs: N consecutive layers up to the top one, bottom first, with their stored inputs `[B, S, H]`.
        delta: error at the top output, `[B, S, H]`.
        needed: which errors must settle: 0 is the error at the lowest input, i + 1 the one at the output of `runs[i]`.
        every_token: hop on until each token's error at each layer has settled by itself.

    Returns:
        Errors `[B, S, H]` at the lowest input and at the N outputs, bottom first, in fp32 at least; those below the
        lowest needed one are delta_L. And for each output the first hop, `[B * S]` of 1 to N, at which a token's error
        changed by at most `tol` of its norm; only complete with `every_token`.
    """
    total = len(runs)
    needed = sorted(needed)
    # errors of 8 bits of mantissa would not settle
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    errors = [delta] * (total + 1)
    hops = [torch.zeros(delta.shape[:-1].numel(), dtype=torch.long, device=delta.device) for _ in errors]
    lowest = needed[0] if needed else total
    for hop in range(1, total - lowest + 1):
        # the errors above are exact already, and so is what they send down
        exact = total - hop + 1
        old = new = errors[exact]
        moving = False
        for place in range(exact - 1, lowest - 1, -1):
            branch = _through_branch(*runs[place], old)
            new = new.to(branch.device) + branch
            old, errors[place] = errors[place].to(branch.device), new
            change, norm = (new - old).norm(dim=-1).flatten(), new.norm(dim=-1).flatten()
            count = hops[place] = hops[place].to(branch.device)
            count[(count == 0) & (change <= tol * norm)] = hop
            if place in needed:
                moving |= not bool(change.norm() <= tol * norm.norm())
            if every_token:
                moving |= not bool(count.all())
        if not moving:
            break
    for place, count in enumerate(hops):
        # an exact error does not change at the hop after
        count[count == 0] = total - place + 1
    return errors, hops[1:]


def _through_branch(run: LayerRun, stored: Tensor, error: Tensor) -> Tensor:
    """`(dg/dx)^T error`: what a layer adds to the error that passes it by."""
    with torch.enable_grad():
        x = stored.detach().requires_grad_()
        output = run.again(x)[0]
    passed = error.to(output.device, output.dtype)
    (below,) = torch.autograd.grad(output, [x], passed)
    return below.to(error.dtype) - passed.to(below.device, error.dtype)
