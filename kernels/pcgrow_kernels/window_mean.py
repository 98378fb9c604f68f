"""Causal means: of each token's window, the tokens of its own text up to and with itself.

    m_t = sum_{i in w_t} x_i / n_t        w_t = {i : i is real, max(start_t, t - W + 1) <= i <= t}        n_t = |w_t|

By running sums, so that the cost does not grow with W and a text can come in several calls.
Shapes: B rows of S tokens, P tokens of them in earlier calls, D values a token.
"""

import torch
from torch import Tensor


def totals(values: Tensor, real: Tensor, past: Tensor | None = None) -> Tensor:
    """Running sums of `values` and, last, the running count of real tokens, `[B, P + S, D + 1]` fp64.

    Args:
        values: x, `[B, S, D]` of any floating dtype; what padding holds does not matter.
        real: which tokens are not padding, `[B, S]` bool.
        past: what this gave for the tokens before these, `[B, P, D + 1]`; None: there are none.
    """
    counted = torch.cat([values.double(), torch.ones_like(values[..., :1], dtype=torch.float64)], dim=-1)
    new = torch.where(real.unsqueeze(-1), counted, 0.0).cumsum(dim=1)
    return new if past is None or not past.shape[1] else torch.cat([past, past[:, -1:] + new], dim=1)


def window_means(running: Tensor, tokens: int, window: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """m and n of the last `tokens` places, `[B, S, D]` and `[B, S]` fp64; where n is 0, m is 0.

    Args:
        running: from `totals`, `[B, P + S, D + 1]`.
        tokens: S.
        window: W, tokens; 0: all of the text so far.
        start: place in `running` of the first token of each token's own text, `[B, S]`; None: rows hold one text each.
    """
    first = running.shape[1] - tokens
    at = torch.arange(first, running.shape[1], device=running.device)
    # the last place before the window
    before = (at - window if window else torch.full_like(at, -1)).expand(len(running), -1)
    if start is not None:
        before = torch.maximum(before, start - 1)
    earlier = torch.gather(running, 1, before.clamp_min(0).unsqueeze(-1).expand(-1, -1, running.shape[2]))
    inside = running[:, first:] - torch.where((before >= 0).unsqueeze(-1), earlier, 0.0)
    n = inside[..., -1]
    return inside[..., :-1] / n.clamp_min(1).unsqueeze(-1), n
