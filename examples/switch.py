"""LoRA behind a switch: the control for gates, as anybody would build it in a few lines.

A linear classifier reads the mean hidden state of a text's first tokens and turns LoRA on or off for the rest of it. It
has LoRA's gain where it says yes and none of its forgetting where it says no; it knows nothing before it has read those
tokens, and cannot tell the parts of a text that mixes domains.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import corpora

SEEN = 32  # tokens that the switch reads
RIDGE = 1e-3


@torch.no_grad()
def features(model: PeftModel, windows: Tensor, batch: int = 16) -> Tensor:
    """Mean hidden state of the base over the first tokens, after a third of its layers, `[N, H]`; windows `[N, S]`."""
    found, device = [], next(model.parameters()).device
    layer = model.get_base_model().config.num_hidden_layers // 3
    with model.disable_adapter():
        for chunk in windows[:, :SEEN].split(batch):
            states = model(input_ids=chunk.to(device), output_hidden_states=True, use_cache=False).hidden_states
            found.append(states[layer].float().mean(1).cpu())
    return torch.cat(found)


class Switch:
    """Ridge regression of domain (1) against other text (-1) on `features`."""

    def __init__(self, model: PeftModel, domain: Tensor, retain: Tensor):
        x = torch.cat([features(model, domain), features(model, retain)]).double()
        y = torch.cat([torch.ones(len(domain)), -torch.ones(len(retain))]).double()
        self.mean, self.scale = x.mean(0), x.std(0).clamp_min(1e-6)
        x, self.offset = (x - self.mean) / self.scale, y.mean()
        products = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        self.weight = torch.linalg.solve(products, x.T @ (y - self.offset))

    def on(self, model: PeftModel, windows: Tensor) -> Tensor:
        """Whether each window is the domain's, `[N]`."""
        x = (features(model, windows).double() - self.mean) / self.scale
        return x @ self.weight + self.offset > 0


@torch.no_grad()
def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Nats of each predicted token, `[N, S - 1]`."""
    found = []
    for ids in corpora.in_batches(model, windows):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        found.append(cross_entropy(logits.mT, ids[:, 1:], reduction="none").cpu())
    return torch.cat(found)


def losses(model: PeftModel, task: corpora.Task, count: int) -> dict[str, Any]:
    """Held-out loss of each text with LoRA behind a switch fitted on `count` windows of each side, and how often it is
    on there: `{"after": ..., "on": ...}`."""
    model.eval()
    each = max(1, count // len(task.retain))
    retain = torch.cat([corpora.spread(train, each) for train, _ in task.retain.values()])
    switch = Switch(model, corpora.spread(task.domain_train, count), retain)
    after, share = {}, {}
    for name, windows in task.held_out.items():
        on = switch.on(model, windows)
        adapted = token_losses(model, windows)
        with model.disable_adapter():
            plain = token_losses(model, windows)
        use = on[:, None].expand_as(plain) & (torch.arange(plain.shape[1]) >= SEEN - 1)
        after[name] = float(torch.where(use, adapted, plain).mean())
        share[name] = float(on.float().mean())
    return {"after": after, "on": share}
