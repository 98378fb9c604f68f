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
    """The sweep's layers run again, and their weights are gathered no more often than for backprop: once in the forward
    and once in the backward, of each half of a batch; gradients are spread once."""
    model, bare = fsdp_script.grow(), build(num_experts_per_tok=2)
    layers = sum(p.numel() * 4 for p in fsdp_script.layers_of(model).parameters())
    outside = sum(p.numel() * 4 for p in bare.parameters()) - sum(p.numel() * 4 for p in bare.model.layers.parameters())
    banks = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    for traffic in (found["traffic"] for found in ranks):
        assert traffic["sweep"] == traffic["direct"] == traffic["backprop"]
        # stacks of one expert and of three are padded
        gathered, spread = (traffic["sweep"][f"c10d::_{name}_base_"] for name in ("allgather", "reduce_scatter"))
        assert gathered == pytest.approx(fsdp_script.HALVES * (2 * layers + outside), rel=0.1)
        assert spread == pytest.approx(banks, rel=0.2)


@pytest.fixture(scope="module")
def measured() -> dict:
    """By one process, of all of the text."""
    return fsdp_script.maps()


@pytest.mark.parametrize("case", ["base", "without text", "in parts", "newborns"])
def test_maps(ranks, measured, case):
    """Of a sharded model: sums, folds, gates and held-out text are those of one process that has all of it."""
    want, facts = measured["maps"][case]
    for tensors, found in (each["maps"]["maps"][case] for each in ranks):
        assert tensors.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text)
            assert torch.equal(tensors[name], ranks[0]["maps"]["maps"][case][0][name]), name
        assert found["base"] == facts["base"]
        assert found["run"]["weights"] == facts["run"]["weights"]
        assert (found["tokens"], found["labels"]) == (facts["tokens"], facts["labels"])


def test_one_layer_is_whole_at_a_time(ranks):
    for found in ranks:
        assert found["maps"]["whole at a time"] == {1}


def test_gates_are_fitted_anew(ranks, measured):
    for found in ranks:
        for name, gate in measured["refitted"].items():
            torch.testing.assert_close(found["maps"]["refitted"][name], gate, rtol=1e-4, atol=1e-4)


def test_a_process_that_ends_while_a_map_is_measured(ranks):
    """The other does not wait for it."""
    assert "dying" not in ranks[1]
    assert ranks[0]["dying"].startswith("RuntimeError: ")
    assert "onnection" in ranks[0]["dying"]


BROKEN = {
    "NaN in one process": r"FloatingPointError: the gradient of .* is NaN or infinite",
    "zeros": r"adapter 'default' trains on nothing.*no gradient came back",
    "lost": r"layers.0.mlp.experts.pcgrow_gate_up_proj.default.weight has no gradient.*set_requires_gradient_sync",
    "outside": r"lm_head.modules_to_save.default.weight trains beside parameters that fully_shard.*fully_shard on",
}
REFUSED = {
    "optimizer before": r"an optimizer holds the banks as they were before fully_shard.*create it afterwards",
    "map, relaxed": r"ValueError: the model is sharded by fully_shard.*Sweep, and give what `sample_text` wrote before",
    "map, text of its own": r"ValueError: the model is sharded by fully_shard.*what `sample_text` wrote before",
    "map, no disk": r"measure_errors failed on process 1 of 2: OSError: the disk is gone|^OSError: the disk is gone",
    "map, not finite": r"measure_errors failed on process 1 of 2: FloatingPoint.*|^FloatingPointError: the loss of a b",
    "order": r"order_by_surprisal needs its weights whole.*before the model is sharded",
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
