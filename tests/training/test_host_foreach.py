"""What `training/host.py` names of torch is there; after an upgrade, look here first."""

from host_names import missing


def test_names():
    assert missing("torch", {f"torch._foreach_{name}_": None for name in ("add", "lerp", "mul")}, {}) == []
