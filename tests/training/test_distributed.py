"""Two processes (gloo) train as one process does on the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ddp_script
import two_processes
from close import assert_all_close
from peft_pcgrow import measure_errors

pytestmark = pytest.mark.cpu("processes meet over gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    return two_processes.run(Path(ddp_script.__file__), tmp_path_factory.mktemp("ranks"))


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["loop", "trainer"])
def test_processes_agree(ranks, way):
    """After the last step both processes hold the same bits, which are not those of the start."""
    start = ddp_script.banks(ddp_script.grow())
    one, two = (found[way]["banks"] for found in ranks)
    assert one.keys() == two.keys() == start.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
        assert not torch.equal(one[name], start[name]), name


def test_experts_with_rows_on_one_process(ranks):
    """The case is there: some located experts have rows on one process only."""
    one, two = (found["loop"]["rows"] for found in ranks)
    assert int(((one > 0) != (two > 0)).sum()) > 0


def test_loop_equals_one_process(ranks):
    """SGD on halves of each batch, gradients averaged, is SGD on the whole batch."""
    assert_close(ranks[0]["loop"]["banks"], ddp_script.loop(None)["banks"])


@pytest.mark.slow
def test_newborns_agree(ranks):
    """Gated rows, and updates kept off some directions: two processes hold the same bits, those of one process."""
    start, single = ddp_script.banks(ddp_script.newborns()), ddp_script.loop(None, spawn=True)["banks"]
    one, two = (found["spawn"]["banks"] for found in ranks)
    assert_close(one, single)
    for name in one:
        assert torch.equal(one[name], two[name]), name
        assert not torch.equal(one[name], start[name]), name


@pytest.mark.slow
def test_trainer_equals_one_process(ranks, tmp_path):
    """So it is in the Trainer, accumulation included."""
    single = ddp_script.train(tmp_path, ddp_script.ROWS)
    assert_close(ranks[0]["trainer"]["banks"], single["banks"])
    assert ranks[0]["trainer"]["losses"] == pytest.approx(single["losses"], rel=1e-3)


def test_error_maps(ranks):
    """All processes measure after the same steps, whatever their clocks say, the map of what all of them were given.

    Training is as without.
    """
    batches = [ddp_script.batch(10), ddp_script.batch(11)]
    expected = measure_errors(ddp_script.grow(), batches, gradients=False, progress=False)
    for found in ranks:
        assert found["mapped"]["steps"] == [0, 2, 4]
        assert_all_close({"mass": found["mapped"]["map"]}, {"mass": expected.mass}, "fp32")
        assert torch.equal(found["mapped"]["map"], ranks[0]["mapped"]["map"])
        assert found["mapped"]["losses"] == found["trainer"]["losses"]
        for name, bank in found["trainer"]["banks"].items():
            assert torch.equal(found["mapped"]["banks"][name], bank), name


@pytest.mark.slow
def test_map_of_all_processes(ranks):
    """Sums, folds and gates are those of one process that reads all of the text."""
    whole = ddp_script.mapped_whole()
    for found in ranks:
        for name, tensor in ddp_script.tensors(whole).items():
            torch.testing.assert_close(found["whole"][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: n + t)
            assert torch.equal(found["whole"][name], ranks[0]["whole"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["sweep", "relax"])
def test_process_without_text(ranks, settle):
    """It takes part: the map, and that of the held-out text, are those of the process that has the text."""
    options = {} if settle == "sweep" else {"settle": "relax", "settle_tol": 1e-9}
    want = ddp_script.parts(ddp_script.without_text(**options))
    for found in ranks:
        got = found["without text" if settle == "sweep" else "without text, relaxed"]
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=0, msg=lambda text, n=name: n + text)


def test_order_of_all_processes(ranks):
    """Each measured a share of the examples; the order is one process's."""
    want = ddp_script.ordered()
    for found in ranks:
        assert torch.equal(found["ordered"], want)


REFUSED = {
    "other base": "ValueError: measure_errors on 2 processes needs the same on each, and weights differs",
    "other weights": "ValueError: measure_errors on 2 processes needs the same on each, and weights differs",
    "other options": "ValueError: measure_errors on 2 processes needs the same on each, and sketch differs",
    "no text": "ValueError: the corpus has no label token",
    "broken": ("RuntimeError: measure_errors failed on process 1 of 2: OSError: the disk is gone", "OSError: the disk"),
    "no number": ("ValueError: max_tokens must be", "ValueError: max_tokens must be"),
    "retain": ("RuntimeError: measure_errors failed on process 1 of 2: OSError: the disk is gone", "OSError: the disk"),
    "order": "ValueError: order_by_surprisal on 2 processes needs the same on each, and weights differs",
    "example": (
        "RuntimeError: order_by_surprisal failed on process 1 of 2: ValueError: example 21",
        "ValueError: exam",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_processes_that_do_not_fit_together(ranks, case):
    """All of them say so, and none waits for another."""
    wanted = REFUSED[case]
    for rank, found in enumerate(ranks):
        text = wanted if isinstance(wanted, str) else wanted[rank]
        assert found["refused"][case].startswith(text)


@pytest.mark.slow
def test_plan_of_all_processes(ranks):
    """All compress and shrink alike, to the bit, and as one process that has all of the text."""
    single = ddp_script.planned()
    assert single["stopped"] is not None
    for found in (found["planned"] for found in ranks):
        for name in ("forms", "numbers", "stopped"):
            assert found[name] == single[name], name
        assert found["tensors"].keys() == single["tensors"].keys()
        assert all(torch.equal(tensor, single["tensors"][name]) for name, tensor in found["tensors"].items())


def test_poison_on_one_process(ranks):
    """A NaN loss on one process refuses the step on both."""
    for found in ranks:
        assert "the step is refused and no weight has changed" in found["poisoned"]


def test_announced_once(ranks):
    """One line per training run, from the first process: four runs, four lines."""
    lines = [line for line in ranks[0]["stderr"].splitlines() if line.startswith("pcgrow: adapter 'default' grows 10 ")]
    assert len(lines) == 4
