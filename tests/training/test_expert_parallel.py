"""Experts shared out over two processes by transformers (gloo): all that grows, as in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import distributed

import expert_parallel_script
import two_processes
from peft_pcgrow import PCGrowConfig
from tiny import assert_same, build, contrast, grown, logits

pytestmark = [
    pytest.mark.cpu("processes meet over gloo"),
    pytest.mark.skipif(
        "ep_size" not in distributed.DistributedConfig.__dataclass_fields__, reason="this transformers has no ep_size"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """Where all of it is, what one process finds, and what two do."""
    folder = tmp_path_factory.mktemp("shared")
    build().save_pretrained(folder / "base")
    contrast().save(folder / "map")
    adapted = grown(init_weights=False)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    ranks = two_processes.run(Path(expert_parallel_script.__file__), folder)
    models = expert_parallel_script.Models(folder, None)
    return folder, expert_parallel_script.everything(models, models), ranks


def nearly(found: dict[str, Any], wanted: dict[str, Any], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("growth", [*expert_parallel_script.GROWTHS, "several", "beside", "one token"])
def test_gradients(found, growth):
    """Of all banks, their norm, and what clipping makes of them."""
    _, want, ranks = found
    assert float(want[growth]["norm"]) > 1.5 * expert_parallel_script.CLIPPED
    for got in ranks:
        nearly(got[growth], want[growth])


@pytest.mark.parametrize("kind", ["adamw", "muon", "protect adamw"])
def test_steps(found, kind):
    """Losses and banks of clipped steps."""
    _, want, ranks = found
    assert float(want[kind]["losses"][-1]) < float(want[kind]["losses"][1]) - 0.01
    for got in ranks:
        torch.testing.assert_close(got[kind]["losses"], want[kind]["losses"], rtol=0, atol=1e-4)
        nearly(got[kind]["banks"], want[kind]["banks"], atol=1e-3)


def test_evaluation(found):
    _, want, ranks = found
    for got in ranks:
        for name in ("trained", "spawned"):
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-3)
        torch.testing.assert_close(got["loaded"], want["loaded"], rtol=1e-5, atol=1e-5)
        assert torch.equal(got["written"], want["written"])
        for written in (*got["merged"], want["merged"][1]):
            assert torch.equal(written, want["merged"][0])


@pytest.mark.parametrize("which", ["map", "map of grown"])
def test_maps(found, which):
    """Every process has all of it."""
    _, want, ranks = found
    assert any(name.startswith("gradient.") for name in want[which])
    loose = 1e-4 if which == "map" else 1e-2  # of models that have trained apart for five steps
    for got in ranks:
        nearly(got[which], want[which], rtol=loose, atol=loose)
        assert_same(got[which], ranks[0][which])


def test_beside_training(found):
    """Gates fitted anew, a rate, an order."""
    _, want, ranks = found
    for got in ranks:
        nearly(got["gates"], want["gates"], rtol=1e-4, atol=1e-4)
        for name in ("rate", "order"):
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


def test_files(found):
    """An adapter is saved whole, is one process's to load, and comes back from two processes as it was."""
    folder, want, ranks = found
    for got in ranks:
        assert_same(got["again"], want["again"])
    models = expert_parallel_script.Models(folder, None)
    loaded = logits(models.loaded("saved True"))
    torch.testing.assert_close(loaded, ranks[0]["trained"], rtol=1e-5, atol=1e-5)
    config = [PCGrowConfig.from_pretrained(str(folder / f"saved {shared}")) for shared in (True, False)]
    assert config[0].base == config[1].base
    assert config[0].base["stacks"] is not None, "whose base is told by its weights"


def test_resumed(found):
    for before, after in (each["resumed"] for each in found[2]):
        assert len(before) == 2
        assert before == after


REFUSED = {
    "lora": "lora=LoraConfig",
    "modules": "modules_to_save=['lm_head'] is not supported yet where processes share out the experts",
    "parts": "parts={'1': {'1': ['down_proj']}} is not supported yet where processes share out the experts",
    "low": "low_cpu_mem_usage=True is not supported yet where processes share out the experts",
    "merge": "and merging needs its weights whole on each process",
    "map of other text": "needs the same on each, and the text differs",
    "train on other text": "came with other text each: all must be given every batch",
    "other text each": "What can grow is DistributedConfig(tp_size=N, ep_size=N) on N processes",
    "inside": "make the optimizer with inside_sweep=False",
}
ELSEWHERE = "what was called needs the others too. measure_errors, get_peft_model, find_lr"


def test_refused(found):
    for said in (each["said"] for each in found[2]):
        assert said.keys() == {*REFUSED, "find", "plan", "shrink"}
        for name, text in said.items():
            assert REFUSED.get(name, ELSEWHERE) in text, (name, text)
            assert text.startswith("RuntimeError" if name == "inside" else "ValueError"), text
