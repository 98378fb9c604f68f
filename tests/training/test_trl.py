"""TRL's trainers take a PCGrowConfig and run with their defaults, which balance the experts of a mixture."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from close import assert_all_close
from peft_pcgrow import PCGrowConfig, measure_errors
from tiny import trainable

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

MODEL = Path(__file__).parents[2] / "examples" / "embedded-moe"
LOCUS = {1: [1, 4], 3: [0, 3]}
TEXTS = ["a map is a function", "the list is empty", "an error is raised", "this returns a new object"] * 2
ROWS = {
    "SFT": {"text": TEXTS},
    "DPO": {"prompt": TEXTS, "chosen": [" of names"] * len(TEXTS), "rejected": [" of"] * len(TEXTS)},
    "GRPO": {"prompt": TEXTS},
}
LENGTH = {"max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
SAMPLED = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 8}


class Noted(TrainerCallback):
    """The gradients of the first step."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = self.gradients or {name: p.grad.clone() for name, p in trainable(model).items()}


def base():
    return AutoModelForCausalLM.from_pretrained(MODEL)


def begin(method: str, folder: Path, config: PCGrowConfig, callback: TrainerCallback, **settings) -> Trainer:
    """A trainer with TRL's defaults, but for how long it trains."""
    sampled = {"reward_funcs": lambda completions, **_: [float(len(text) % 7) for text in completions]}
    torch.manual_seed(0)
    return getattr(trl, f"{method}Trainer")(
        model=base(),
        args=getattr(trl, f"{method}Config")(
            **{"output_dir": str(folder), **LENGTH, **(SAMPLED if method == "GRPO" else {}), **settings}
        ),
        train_dataset=datasets.Dataset.from_dict(ROWS[method]),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=config,
        callbacks=[callback],
        **(sampled if method == "GRPO" else {}),
    )


@pytest.fixture(scope="module")
def newborns() -> PCGrowConfig:
    words = AutoTokenizer.from_pretrained(MODEL)
    rows = [words(" ".join(TEXTS[i:] + TEXTS[:i]), return_tensors="pt")["input_ids"][:, :16] for i in range(8)]
    texts = [torch.cat(rows[:4]), torch.cat(rows[4:])]
    other = [rows.flip(1) for rows in texts]
    emap = measure_errors(base(), texts, retain=other, window=4, progress=False)
    return PCGrowConfig(error_map=emap, locus=LOCUS, grow="spawn", gate_fpr=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFT", "DPO", "GRPO"])
def test_defaults_train(method, tmp_path):
    """With the load-balancing loss that they add, and every bank moves."""
    noted = Noted()
    trainer = begin(method, tmp_path, PCGrowConfig(locus=LOCUS), noted)
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] > 0
    assert len(noted.gradients) == 4
    assert all(bool(gradient.any()) for gradient in noted.gradients.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFT", "DPO", "GRPO"])
def test_gradients_are_those_of_backprop(method, tmp_path):
    """A load-balancing loss of much weight is in them."""
    found = {}
    for settle, coefficient in (("sweep", 1.0), ("backprop", 1.0), ("sweep", 0.0)):
        noted = Noted()
        config = PCGrowConfig(locus=LOCUS, settle=settle)
        settings = {"bf16": False, "max_steps": 1, "router_aux_loss_coef": coefficient}
        begin(method, tmp_path / f"{settle}{coefficient}", config, noted, **settings).train()
        found[settle, coefficient] = noted.gradients
    assert_all_close(found["sweep", 1.0], found["backprop", 1.0], "fp32")
    for name, gradient in found["sweep", 0.0].items():
        assert not torch.allclose(gradient, found["sweep", 1.0][name], rtol=0.1), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFT", "GRPO"])
def test_newborns_train(method, tmp_path, newborns):
    noted = Noted()
    begin(method, tmp_path, newborns, noted).train()
    assert any(bool(gradient.any()) for gradient in noted.gradients.values())
