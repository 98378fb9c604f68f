"""Two processes that FSDP2 (`fully_shard`) shards a model over train as one process does on the whole batch."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import fsdp_script
import two_processes
from tiny import assert_same, build, snapshot

pytestmark = [pytest.mark.cpu("processes meet over gloo"), pytest.mark.slow]
# gradients in fp32, and losses after steps that each round otherwise
GRADIENTS, LOSSES = 1e-5, 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder) -> dict:
    """What one process finds; its checkpoint is for both of two."""
    born = fsdp_script.newborns()
    found = {"deepened": fsdp_script.train(fsdp_script.grow(), folder / "one")}
    return found | {"spawned": fsdp_script.train(born, text=fsdp_script.mixed), "written": fsdp_script.written(born)}


@pytest.fixture(scope="module")
def ranks(folder, one) -> list[dict]:
    """What each of two processes found."""
    return two_processes.run(Path(fsdp_script.__file__), folder)


def assert_near(found: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = GRADIENTS) -> None:
    assert found.keys() == want.keys()
    apart = {name: float((found[name].float() - w.float()).norm() / w.float().norm()) for name, w in want.items()}
    assert max(apart.values()) < tolerance, apart


@pytest.mark.parametrize("way", fsdp_script.WAYS)
def test_gradients(ranks, way):
    """Of every way to settle, also of banks whose experts lie on one process only: those of one process."""
    want = fsdp_script.gradients(fsdp_script.grow(**fsdp_script.WAYS[way]))
    assert all(bool(gradient.any()) for gradient in want.values())
    for found in ranks:
        assert_near(found[way], want)


@pytest.mark.parametrize("how", ["offloaded", "checkpointed"])
def test_gradients_with(ranks, how):
    for found in ranks:
        assert_near(found[how], ranks[0]["sweep"])


def test_mixed_precision(ranks):
    """bf16 on the way and fp32 between processes: bit for bit backprop's, and near fp32's."""
    for found in ranks:
        assert_same(found["bf16"]["sweep"], found["bf16"]["backprop"])
        for name, gradient in found["sweep"].items():
            cosine = torch.cosine_similarity(gradient.flatten(), found["bf16"]["sweep"][name].flatten(), dim=0)
            assert float(cosine) > 0.95, name


@pytest.mark.parametrize("what", ["deepened", "spawned"])
def test_training(ranks, one, what):
    """Steps of Muon, on batches in two parts, clipped; newborns with gates, LoRA and protected directions."""
    for found in ranks:
        assert found[what]["losses"] == pytest.approx(one[what]["losses"], abs=LOSSES)
        assert_near(found[what]["weights"], one[what]["weights"], LOSSES)


@pytest.mark.parametrize("start", ["resumed", "resumed from one"])
def test_resume(ranks, start):
    """From torch's checkpoint after half of the steps, of as many processes or of one: as without an interruption."""
    want = ranks[0]["deepened"]
    for found in ranks:
        assert found[start]["losses"] == pytest.approx(want["losses"][fsdp_script.STEPS // 2 :], abs=LOSSES)
        assert_near(found[start]["weights"], want["weights"], 1e-12 if start == "resumed" else LOSSES)


def test_resume_in_one_process(ranks, folder):
    found = fsdp_script.resume(folder / "half")
    assert_near(found["weights"], ranks[0]["deepened"]["weights"], LOSSES)


def test_saved(ranks, folder):
    """One file, that of an adapter as ever: one process reads it, and so does a model that is sharded already."""
    for found in ranks:
        assert_same(found["saved"]["weights"], found["saved"]["after"])
        assert all(not torch.equal(held, found["saved"]["after"][n]) for n, held in found["saved"]["before"].items())
    base = build(dtype=torch.bfloat16, num_experts_per_tok=2)
    read = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    assert_same({n: p for n, p in snapshot(read).items() if n in found["saved"]["weights"]}, found["saved"]["weights"])
    torch.testing.assert_close(fsdp_script.logits(read), found["saved"]["logits"])


def test_generation(ranks, one):
    """Newborns' gates follow a text from call to call."""
    for found in ranks:
        assert torch.equal(found["written"], one["written"])


def test_gates_are_equal(ranks):
    """Gates, thresholds and directions are whole on each process."""
    assert_same(ranks[0]["buffers"], ranks[1]["buffers"])
    assert all(type(held) is Tensor for found in ranks for held in found["buffers"].values())


def test_bytes_sent(ranks):
    """The sweep's layers run again, and their weights are gathered no more often than for backprop."""
    for found in ranks:
        sweep, backprop = (sum(found["traffic"][way].values()) for way in ("sweep", "backprop"))
        assert 0 < sweep <= 1.05 * backprop


BROKEN = {
    "NaN in one process": r"FloatingPointError: the gradient of .* is NaN or infinite",
    "zeros": r"adapter 'default' trains on nothing.*no gradient came back",
    "lost": r"layers.0.mlp.experts.pcgrow_gate_up_proj.default.weight has no gradient.*set_requires_gradient_sync",
    "outside": r"lm_head.modules_to_save.default.weight trains beside parameters that fully_shard.*fully_shard on",
}
REFUSED = {
    "optimizer before": r"an optimizer holds the banks as they were before fully_shard.*create it afterwards",
    "map": r"measure_errors needs its weights whole.*before the model is sharded",
    "find_lr": r"find_lr needs its weights whole.*before the model is sharded",
    "merge": r"merging needs its weights whole",
    "another adapter": r"growing needs its weights whole.*before the model is sharded",
    "plan": r"gate_up_proj is a DTensor \(sharded by fully_shard",
    "Muon on split matrices": r"shape \(4, 4\) are split between processes",
    "FSDP1": r"FullyShardedDataParallel \(FSDP1\).*Shard by fully_shard \(FSDP2",
}


@pytest.mark.parametrize(("part", "case"), [("broken", c) for c in BROKEN] + [("refused", c) for c in REFUSED])
def test_refused(ranks, part, case):
    """On all processes, and no weight has moved."""
    for found in ranks:
        assert re.search((BROKEN | REFUSED)[case], found[part][case]), found[part][case]
        assert not found[part][case].endswith("(moved)")
