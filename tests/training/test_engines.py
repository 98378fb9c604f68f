"""Engines that spread a model over two processes (gloo): as one process, or refused by name before anything moves."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import distributed

import engines_script
import fresh
from close import assert_close
from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, find_experts, measure_errors, order_by_surprisal
from tiny import LOCUS, assert_same, build, grown, logits, snapshot, spawned, tokens

pytestmark = pytest.mark.cpu("processes meet over gloo")


def ran(folder: Path, *parts: str, forked: bool = True, **variables: str) -> list[dict[str, Any]]:
    """What two processes found in each part."""
    for process in fresh.two(Path(engines_script.__file__), folder, *parts, forked=forked, **variables):
        assert process.returncode == 0, process.stderr[-4000:]
    written = [{part: folder / f"{part}{rank}.pt" for part in parts} for rank in range(2)]
    return [{part: torch.load(path) for part, path in each.items() if path.exists()} for each in written]


def nearly(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: n + text)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engines")
    build().save_pretrained(folder / "base")
    adapted = grown(init_weights=False)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    meshes = ["tp"] if "ep_size" in distributed.DistributedConfig.__dataclass_fields__ else []
    found = ran(folder, "together", *meshes, "dying")
    found[0]["merged"] = adapted.base_model.model.eval()
    return found


def test_text_that_one_process_has(ranks):
    """Maps, gates, plans, rates, orders and Muon's steps are one process's, to rounding, and alike on both."""
    torch.manual_seed(0)
    want = engines_script.together()
    for found in (each["together"] for each in ranks):
        assert found["forms"] == want["forms"]
        for name in ("map", "down", "gate", "rates", "order", "muon"):
            torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-6)
            assert torch.equal(found[name], ranks[0]["together"][name]), name


def test_a_process_that_ends(ranks):
    """The other does not wait for it."""
    assert ranks[0]["dying"].startswith("RuntimeError: ")
    assert "onnection" in ranks[0]["dying"]


def test_matrices_split_by_transformers(ranks):
    """Each operation says what the model is, and what was merged is served there as it is by one process."""
    if "tp" not in ranks[0]:
        pytest.skip("this transformers has no ep_size")
    wanted = ranks[0]["merged"].generate(input_ids=tokens(2, 8), max_new_tokens=6, do_sample=False)
    for found in (each["tp"] for each in ranks):
        assert "DTensor" in found["kinds"]
        for operation, said in found["said"].items():
            assert said.startswith("ValueError: Qwen3MoeForCausalLM is spread over processes by transformers"), (
                operation
            )
            assert "(tp_size=2)" in said, operation
            assert "distributed_config=None" in said, operation
        assert torch.equal(found["written"], wanted)


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (pip install deepspeed)"
)


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> list[dict[str, Any]]:
    return ran(tmp_path_factory.mktemp("zero"), "zero2", "zero3", forked=False, DS_ACCELERATOR="cpu")


@needs_deepspeed
def test_zero2_in_the_trainer(zero, tmp_path):
    """20 steps, half of them again from a checkpoint, and the adapter read back.

    On CPUs the Trainer's loader gives both processes the same rows, so one process has batches of that size.
    """
    want = engines_script.trained(tmp_path, 2, optim="sgd", save_strategy="no", use_cpu=True)
    for found in (each["zero2"] for each in zero):
        for name in ("trained", "resumed"):
            assert len(found[name]["losses"]) == engines_script.STEPS
            assert found[name]["losses"] == pytest.approx(want["losses"], abs=1e-4)
            nearly(found[name]["banks"], want["banks"])
        assert_same(found["trained"]["banks"], found["resumed"]["banks"])
        assert torch.equal(found["loaded"], found["trained"]["logits"])


@needs_deepspeed
@pytest.mark.parametrize("growth", ["deepen", "spawn"])
def test_zero2_gradients_and_maps(zero, growth):
    """Each step's gradient, and the map that is measured after it, on both processes."""
    model = grown() if growth == "deepen" else spawned()
    want = engines_script.stepped(model.train(), spawn=growth == "spawn")
    for found in (each["zero2"][growth] for each in zero):
        for got, gradients in zip(found["gradients"], want["gradients"], strict=True):
            nearly(got, gradients)
        for got, mass in zip(found["maps"], want["maps"], strict=True):
            torch.testing.assert_close(got, mass, rtol=1e-5, atol=0)
        torch.testing.assert_close(found["logits"], want["logits"], rtol=1e-5, atol=1e-5)
    if growth == "spawn":
        wanted = model.generate(input_ids=tokens(2, 8), max_new_tokens=6, do_sample=False)
        assert all(torch.equal(each["zero2"]["written"], wanted) for each in zero)
        assert all(each["zero2"]["gates"] for each in zero), "casting to bf16 has changed the gates"


SAID = {
    "protect": "DeepSpeed's ZeRO steps flat copies of the weights",
    "muon": "an orthogonal group needs matrices or stacks of them, got shapes [(3840,)]; DeepSpeed's ZeRO",
    "find_lr": "DeepSpeed's ZeRO (DeepSpeedZeroOptimizer) takes gradients away as they come: call find_lr before",
}


@needs_deepspeed
def test_zero2_refuses(zero):
    for found in (each["zero2"]["said"] for each in zero):
        assert {name: said.startswith(f"ValueError: {SAID[name]}") for name, said in found.items()} == dict.fromkeys(
            SAID, True
        )


@needs_deepspeed
def test_zero3(zero):
    """Whatever reads weights or trains is refused; hooks gather what evaluation needs, which has the model's bits."""
    model = grown().eval()
    for found in (each["zero3"] for each in zero):
        for operation, said in found["said"].items():
            assert "is partitioned by DeepSpeed (ZeRO-3)" in said, operation
            assert "zero_optimization.stage 2" in said, operation
        assert torch.equal(found["logits"], logits(model))
        wanted = model.generate(input_ids=tokens(2, 8), max_new_tokens=6, do_sample=False)
        assert torch.equal(found["written"], wanted)


def partitioned(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]
    return model


def test_partitioned_parameters_are_told(tmp_path):
    """By DeepSpeed's mark, where it is not installed."""
    ids, model = tokens(), partitioned(grown().train())
    for call in (
        lambda: find_experts(model),
        lambda: get_peft_model(partitioned(build()), PCGrowConfig(locus=LOCUS)),
        lambda: measure_errors(model, [ids], progress=False),
        lambda: order_by_surprisal(list(ids), model, progress=False),
        lambda: model(input_ids=ids, labels=ids),
        lambda: model.save_pretrained(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"is partitioned by DeepSpeed \(ZeRO-3\)"):
            call()
    assert not [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]  # PEFT begins with a README


def test_flattened_matrices():
    """As ZeRO and FSDP1 put them into the groups of an optimizer: no step, and no weight has moved."""
    model = grown().train()
    optimizer = create_pcgrow_optimizer(model, lr=0.1)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(ValueError, match=r"needs matrices or stacks of them, got shapes \[\(7680,\)\]"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_gates_stay_what_they_are():
    """A model that is cast takes the same tokens: banks are rounded, gates not."""
    model = spawned()
    gates = {name: held.clone() for name, held in model.named_buffers() if "pcgrow_gate" in name}
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_same(gates, {name: held for name, held in snapshot(model).items() if name in gates})
    model.float()
    assert_close("logits", logits(model), logits(spawned()), "bf16")
