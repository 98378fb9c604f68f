"""The runner of PEFT's own suite, as far as it goes without a network."""

import torch

from peft_suite import negative
from tiny import build, grown, logits


def test_the_fault_breaks_a_merge(monkeypatch):
    """With the negative control in place a merge says that it merged, and the model computes as the base."""
    model = grown(init_weights=False)
    adapted = logits(model)
    monkeypatch.setattr(*negative.FAULTS["merge"])
    model.merge_adapter()
    assert all(layer.merged for layer in model.base_model.tuner_layers())
    assert torch.equal(logits(model), logits(build()))
    assert not torch.allclose(logits(model), adapted, atol=1e-3, rtol=1e-3)
