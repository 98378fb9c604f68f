"""What `rounds/host.py` names of transformers is there; after an upgrade, look here first."""

from peft_pcgrow.rounds.host import INPUT_HOOKS
from tiny import build


def test_names():
    model = build()
    assert not any(getattr(model, name, None) for name in INPUT_HOOKS)
    model.enable_input_require_grads()
    assert any(getattr(model, name, None) for name in INPUT_HOOKS)
    model.disable_input_require_grads()
    assert not getattr(model, INPUT_HOOKS[0], None)
