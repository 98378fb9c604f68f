"""Causal means: of each token's window, the tokens of its own text up to and with itself.

    m_t = sum_{i in w_t} x_i / n_t        w_t = {i : i is real, max(start_t, t - W + 1) <= i <= t}        n_t = |w_t|

By running sums, so that the cost does not grow with W and a text can come in several calls.
Shapes: B rows of S tokens, P tokens of them in earlier calls, D values a token.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def totals(values: Tensor, real: Tensor | None, past: Tensor | None = None) -> Tensor:
    """Running sums of `values` and, last, the running count of real tokens, `[B, P + S, D + 1]` fp64.

    Args:
        values: x, `[B, S, D]` of any floating dtype; what padding holds does not matter.
        real: which tokens are not padding, `[B, S]` bool; None: all.
        past: what this gave for the tokens before these, `[B, P, D + 1]`; None: there are none.
    """
    new = pad(values.double(), (0, 1), value=1.0)
    new = new if real is None else torch.where(real.unsqueeze(-1), new, 0.0)
    new = new.cumsum(dim=1) if new.shape[1] > 1 else new
    return new if past is None or not past.shape[1] else torch.cat([past, past[:, -1:] + new], dim=1)


def window_means(running: Tensor, tokens: int, window: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """m and n of the last `tokens` places, `[B, S, D]` and `[B, S]` fp64; where n is 0, m is 0.

    Args:
        running: from `totals`, `[B, P + S, D + 1]`.
        tokens: S.
        window: W, tokens; 0: all of the text so far.
        start: place in `running` of the first token of each token's own text, `[B, S]`; None: rows hold one text each.
    """
    total = running.shape[1]
    inside = running[:, total - tokens :]
    if start is not None:
        at = torch.arange(total - tokens, total, device=running.device)
        # the last place before the window
        before = (at - window if window else torch.full_like(at, -1)).expand(len(running), -1)
        before = torch.maximum(before, start - 1)
        earlier = torch.gather(running, 1, before.clamp_min(0).unsqueeze(-1).expand(-1, -1, running.shape[2]))
        inside = inside - torch.where((before >= 0).unsqueeze(-1), earlier, 0.0)
    elif window and total > window:
        # of the last tokens, those whose window does not reach back to the row's beginning
        behind = min(tokens, total - window)
        whole = inside[:, tokens - behind :] - running[:, total - window - behind : total - window]
        inside = whole if behind == tokens else torch.cat([inside[:, : tokens - behind], whole], dim=1)
    n = inside[..., -1]
    return inside[..., :-1] / n.clamp_min(1).unsqueeze(-1), n
