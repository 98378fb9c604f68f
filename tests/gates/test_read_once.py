"""What tells gates how tokens stand in their texts is read once, whatever number of layers is handed it."""

import gc
import weakref

import pytest
import torch

from asked import nothing_asked
from peft_pcgrow.gates.text_borders import _READ, Told


def packed() -> torch.Tensor:
    return torch.tensor([[0, 1, 2, 0, 1, 0]])


def test_read_once():
    told = Told(positions=packed())
    first = told.rows((1, 6))
    assert first.start.tolist() == [[0, 0, 0, 3, 3, 5]]
    with nothing_asked():
        assert Told(positions=told.positions).rows((1, 6)).start is first.start


@pytest.mark.parametrize("mask", [None, torch.ones(1, 6, dtype=torch.long)])
def test_read_again_after_a_change(mask):
    """In place, of the mask beside it, of what is asked."""
    positions = packed()
    told = Told(mask, positions)
    assert told.rows((1, 6)).start.tolist() == [[0, 0, 0, 3, 3, 5]]
    positions[0, 3:] = torch.tensor([3, 0, 1])
    assert told.rows((1, 6)).start.tolist() == [[0, 0, 0, 0, 4, 4]]
    assert Told(torch.tensor([[0, 1, 1, 1, 1, 1]]), positions).rows((1, 6)).real.tolist() == [[False] + 5 * [True]]
    assert told.rows((1, 6)).real.all()


def test_read_again_after_inference():
    """What is made in inference mode cannot take part in training."""
    told = Told(positions=packed())
    with torch.inference_mode():
        assert told.rows((1, 6)).start.is_inference()
    after = told.rows((1, 6))
    assert not after.start.is_inference()
    assert not after.real.is_inference()


def test_outputs_of_cuda_graphs_are_read_each_time():
    """A replay gives the same tensors, with other numbers and the same count of writes."""
    told = Told(torch.ones(1, 6, dtype=torch.long), packed())
    torch._C._set_cached_tensors_enabled(True)
    torch._C._add_cached_tensor(told.mask)
    try:
        assert told.rows((1, 6)).real.all()
        told.mask.data[0, 0] = 0
        assert told.rows((1, 6)).real.tolist() == [[False] + 5 * [True]]
    finally:
        torch._C._remove_cached_tensor(told.mask)
        torch._C._set_cached_tensors_enabled(False)


def test_nothing_is_kept():
    before = len(_READ)
    told = Told(torch.ones(1, 6, dtype=torch.long), packed())
    told.rows((1, 6))
    assert len(_READ) == before + 1
    del told
    gc.collect()
    assert len(_READ) == before


def test_what_is_beside_is_not_kept():
    """A user may hold positions for as long as the run, and each step makes a mask."""
    mask, positions = torch.ones(1, 1, 6, 6, dtype=torch.bool), packed()
    seen = weakref.ref(mask)
    Told(mask, positions).rows((1, 6))
    del mask
    gc.collect()
    assert seen() is None
    before = len(_READ)
    Told(positions.view(1, 6), positions).rows((1, 6))
    del positions
    gc.collect()
    assert len(_READ) == before - 1
