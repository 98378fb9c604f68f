"""Each sample of a batch is computed by the adapter that it names, as with PEFT's LoRA."""

import threading
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from close import assert_close
from peft_pcgrow import PCGrowConfig
from tiny import LOCUS, build, domain, grown, logits, mixed, spawned, spawning, tokens, train

NAMES = ["default", "__base__", "second", "default", "second", "__base__", "third", "default"]


def several(implementation: str = "eager", **config) -> PeftModel:
    """Three trained adapters; the second deepens experts that the first deepens too, the third has newborns there."""
    model = (
        spawned(implementation=implementation)
        if config.pop("spawn", False)
        else grown(implementation=implementation, **config)
    )
    model.add_adapter("second", PCGrowConfig(locus={1: [1, 2], 2: [3, 5]}, **config))
    model.add_adapter("third", spawning(gate_fpr=0.3))
    for seed, name in enumerate(("default", "second", "third")):
        model.set_adapter(name)
        train(model, steps=3, lr=0.05, seed=7 * seed, texts=domain)
    return model


def alone(model: PeftModel, name: str, ids: torch.Tensor, **inputs) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return logits(model, ids, **inputs)
    active = model.active_adapter
    model.set_adapter(name)
    found = logits(model, ids, **inputs)
    model.set_adapter(active)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("active", ["default", "third"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_samples_are_those_of_their_adapter(implementation, active):
    """Within the rounding of another number of rows: samples of other adapters are routed otherwise."""
    model, ids = several(implementation), mixed()
    model.set_adapter(active)
    got = logits(model, ids, adapter_names=NAMES)
    want = {name: alone(model, name, ids) for name in set(NAMES)}
    for row, name in enumerate(NAMES):
        assert_close(name, got[row], want[name][row], "fp32")
    assert len({float(want[name][0].sum()) for name in want}) == 4
    # and the calls to come know nothing of it
    assert torch.equal(logits(model, ids), want[active])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "__base__", "second", "third"])
def test_one_adapter_for_all_keeps_the_bits(name):
    model, ids = several(), mixed()
    model.set_adapter("second")
    assert torch.equal(logits(model, ids, adapter_names=[name] * len(ids)), alone(model, name, ids))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_generate(how):
    """Prompts of mixed lengths; newborns' gates keep what they have seen of each sample."""
    model, ids = several(), mixed()
    mask = torch.ones_like(ids)
    ids[::3, :7], mask[::3, :7] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    got = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    each = settings.get("num_return_sequences", 1)
    for name in set(NAMES) - {"__base__"}:
        model.set_adapter(name)
        want = model.generate(input_ids=ids, **settings)
        for row in [row for row, given in enumerate(NAMES) if given == name]:
            assert torch.equal(got[each * row : each * (row + 1)], want[each * row : each * (row + 1)]), name
    with model.disable_adapter():
        want = model.generate(input_ids=ids, **settings)
    assert torch.equal(got[each : 2 * each], want[each : 2 * each])


@pytest.mark.slow
def test_calls_of_other_threads_have_their_own():
    """While one thread's call is under way, others name other adapters, or none."""
    model, ids = several(), mixed()
    asked = [["second"] * 8, None, NAMES, ["__base__"] * 8] * 3
    want = [logits(model, ids, adapter_names=names) for names in asked]
    got: list = [None] * len(asked)
    together = threading.Barrier(len(asked))

    def serve(place: int) -> None:
        together.wait()
        with torch.no_grad():
            got[place] = model(input_ids=ids, use_cache=False, adapter_names=asked[place]).logits

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(got, want, strict=True):
        assert one is not None
        assert torch.equal(one, other)


@pytest.mark.slow
def test_modules_to_save():
    """Heads and embeddings too are those of each sample's adapter, and the base's for adapters that have none."""
    model, ids = grown(modules_to_save=["lm_head", "embed_tokens"]), tokens(4)
    model.add_adapter("second", PCGrowConfig(locus={1: [2]}))
    train(model, lr=0.05)
    names = ["default", "second", "__base__", "default"]
    got = logits(model, ids, adapter_names=names)
    want = {name: alone(model, name, ids) for name in set(names)}
    for row, name in enumerate(names):
        assert_close(name, got[row], want[name][row], "fp32")
    model.set_adapter("second")
    assert torch.equal(logits(model, ids, adapter_names=names), got)


@pytest.mark.slow
def test_lora_beside():
    """LoRA that is part of an adapter is its samples' alone."""
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, ids = grown(lora=lora), tokens(4)
    model.add_adapter("second", PCGrowConfig(locus={1: [2]}))
    model.add_adapter("third", PCGrowConfig(locus={0: [2]}, lora=lora))
    train(model, lr=0.05)
    names = ["default", "second", "third", "__base__"]
    for active in ("default", "second"):
        model.set_adapter(active)
        got = logits(model, ids, adapter_names=names)
        for row, name in enumerate(names):
            assert_close(name, got[row], alone(model, name, ids)[row], "fp32")


REFUSED = {
    "unknown": (["default", "no such"], ValueError, r"\['no such'\].*adapters here are \['default'\]"),
    "too few": (["default"], ValueError, "1 names for 2 samples"),
    "too many": (["default"] * 3, ValueError, "3 names for 2 samples"),
    "none": ([], ValueError, "0 names for 2 samples"),
    "a string": ("default", TypeError, "a list with the name of an adapter for each sample"),
    "no strings": ([0, 1], TypeError, "a list with the name of an adapter for each sample"),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("what", REFUSED)
def test_names_that_fit_nothing(what, call, task):
    """Whatever PEFT's class around the model hands on of the inputs."""
    model, (names, kind, words) = grown(task_type=task).eval(), REFUSED[what]
    run = model if call == "forward" else model.generate
    with pytest.raises(kind, match=words):
        run(input_ids=tokens(2), adapter_names=names)
    assert logits(model).isfinite().all()


def test_states_that_take_no_names():
    names = ["default", "__base__"]
    with pytest.raises(ValueError, match=r"training mode: call model.eval\(\)"):
        grown().train()(input_ids=tokens(2), adapter_names=names)
    merged = grown()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter"):
        logits(merged, tokens(2), adapter_names=names)
    with pytest.raises(ValueError, match="modules_to_save are Qwen3MoeRMSNorm"):
        logits(grown(modules_to_save=["norm"]), tokens(2), adapter_names=names)
    beside = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), build())
    with pytest.raises(ValueError, match="does not reach Linear beside the grown experts"):
        logits(get_peft_model(beside, PCGrowConfig(locus=LOCUS)), tokens(2), adapter_names=names)
    young = spawned().eval()
    for layer in young.base_model.tuner_layers():
        birth = layer.births["default"]
        layer.births["default"] = replace(birth, parents={birth.spawned[0]: "an elder's"})
    with pytest.raises(ValueError, match="has newborns of another adapter's newborns"):
        young(input_ids=tokens(2), adapter_names=names)
    with pytest.raises(ValueError, match="alora_offsets= belongs to activated LoRA"):
        logits(grown(), tokens(2), alora_offsets=[1, 1])
