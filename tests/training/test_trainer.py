"""Users' own loops, unchanged: transformers' Trainer, TRL's SFTTrainer, GradScaler."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer
from tiny import PAD, VOCABULARY, assert_same, build, snapshot, tokens

LOCUS = {0: [2, 5], 1: [1, 4], 2: [0, 3, 7]}


def rows(count: int = 24, seed: int = 5) -> list[dict[str, Tensor]]:
    """Padded rows of different lengths."""
    ids = tokens(count, 16, seed)
    data = []
    for row, words in enumerate(ids):
        mask = (torch.arange(16) < 6 + row % 11).long()
        words = words.masked_fill(mask == 0, PAD)
        data.append({"input_ids": words, "attention_mask": mask, "labels": words.masked_fill(mask == 0, -100)})
    return data


def grow(settle: str = "sweep", **changes) -> PeftModel:
    return get_peft_model(build(**changes), PCGrowConfig(locus=LOCUS, settle=settle))


def fit(model: PeftModel, folder, resume=None, **settings) -> Trainer:
    """Six steps of two micro-batches of two rows."""
    names = ("compute_loss_func", "optimizers", "eval_dataset", "callbacks")
    beside = {name: settings.pop(name) for name in names if name in settings}
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **settings}),
        train_dataset=rows(),
        **beside,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, what: str) -> Tensor:
    return torch.tensor([float(entry[what]) for entry in trainer.state.log_history if what in entry])


def banks(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in snapshot(model).items() if "pcgrow_" in name}


def squared(outputs, labels, num_items_in_batch=None) -> Tensor:
    """A loss of one's own: squared distance of the probabilities, averaged over the accumulated batch."""
    kept = labels[:, 1:] != -100
    chances = outputs.logits[:, :-1][kept].softmax(-1)
    aims = nn.functional.one_hot(labels[:, 1:][kept], VOCABULARY)
    return (chances - aims).square().sum() / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


SETTINGS = {
    "accumulation and clipping": ({}, 1e-4),
    "warm-up": ({"warmup_steps": 3}, 1e-4),
    "label smoothing": ({"label_smoothing_factor": 0.1}, 1e-4),
    "a loss of one's own": ({"compute_loss_func": squared}, 1e-4),
    "bf16": ({"bf16": True}, 1e-2),
    "checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        1e-4,
    ),
    "reentrant": ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1e-4),
    "weight decay": ({"weight_decay": 0.1, "optim": "adamw_torch"}, 1e-4),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_sweep_trains_as_backprop(setting, tmp_path):
    """Losses and gradient norms of four Trainer steps are those of autograd through the model."""
    settings, rtol = SETTINGS[setting]
    settings = {"max_steps": 4, **settings}
    before = banks(grow())
    swept = fit(grow("sweep"), tmp_path / "sweep", **settings)
    control = fit(grow("backprop"), tmp_path / "backprop", **settings)
    for what in ("loss", "grad_norm"):
        assert len(logged(swept, what)) == 4
        torch.testing.assert_close(logged(swept, what), logged(control, what), rtol=rtol, atol=0.0)
    after = banks(swept.model)
    assert all(not torch.equal(before[name], after[name]) for name in before if "weight" in name)


@pytest.mark.slow
def test_compiled(tmp_path):
    """torch_compile=True (graphs captured and differentiated, run eagerly) gives the same losses."""
    compiled = fit(grow(), tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager")
    plain = fit(grow(), tmp_path, max_steps=2)
    torch.testing.assert_close(logged(compiled, "loss"), logged(plain, "loss"), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(logged(compiled, "grad_norm"), logged(plain, "grad_norm"), rtol=1e-3, atol=0.0)


OPTIMIZERS = {
    "AdamW": lambda model: (None, None),
    "Muon": lambda model: (create_pcgrow_optimizer(model, lr=0.02), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume(optimizer, tmp_path):
    """Six steps on end, and three, a checkpoint and three more: the same bits."""
    whole = grow()
    straight = fit(whole, tmp_path, optimizers=OPTIMIZERS[optimizer](whole), save_strategy="steps", save_steps=3)
    model = grow()
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed = fit(model, tmp_path / "again", optimizers=OPTIMIZERS[optimizer](model), resume=checkpoint)
    assert_same(banks(whole), banks(model))
    assert torch.equal(logged(straight, "loss")[3:], logged(resumed, "loss")[3:])
    assert not torch.equal(logged(straight, "loss")[:3], logged(straight, "loss")[3:])


def test_steps_inside_the_sweep(tmp_path):
    """As after it, to the bit: weights, losses, rates, and gradient norms that are logged though nothing is clipped."""
    found = []
    for inside in (False, True):
        model = grow()
        optimizer = create_pcgrow_optimizer(model, lr=0.02, inside_sweep=inside)
        settings = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "max_steps": 3}
        trainer = fit(model, tmp_path, optimizers=(optimizer, None), **settings)
        found.append((banks(model), [logged(trainer, what) for what in ("loss", "learning_rate", "grad_norm")]))
    (want, logs), (got, others) = found
    assert_same(want, got)
    assert all(map(torch.equal, logs, others))
    assert bool((logs[2] > 0).all())
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps=1"):
        fit(model, tmp_path, optimizers=(optimizer, None), max_grad_norm=0.0, max_steps=1)


@pytest.mark.slow
def test_best_model_at_the_end(tmp_path):
    """load_best_model_at_end puts the best checkpoint's banks back."""
    trainer = fit(
        grow(),
        tmp_path,
        learning_rate=5e-2,
        eval_dataset=rows(8, seed=6),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    losses = logged(trainer, "eval_loss")
    best = int(losses.argmin()) + 1
    assert best < 6, "the last step is the best: nothing is put back"
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    mine = {name.replace(".default", ""): tensor for name, tensor in banks(trainer.model).items() if "weight" in name}
    assert_same({name: tensor for name, tensor in saved.items() if "weight" in name}, mine)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(losses.min()), rel=1e-6)


def sft(trl, folder, config: PCGrowConfig, callbacks=None, **settings) -> Trainer:
    """TRL's SFTTrainer for four steps of four texts."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 128)}}, "<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    texts = [" ".join(f"w{i}" for i in row.tolist()) for row in tokens(16, 12)]
    # newer versions add a load-balancing loss unless told otherwise
    off = {name: 0.0 for name in ("router_aux_loss_coef",) if name in trl.SFTConfig.__dataclass_fields__}
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **off,
    }
    return trl.SFTTrainer(
        model=build(),
        args=trl.SFTConfig(output_dir=str(folder), **{**arguments, **settings}),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=callbacks,
    )


@pytest.mark.slow
def test_sft(tmp_path):
    """TRL's SFTTrainer takes the config itself and trains as with backprop."""
    trl = pytest.importorskip("trl")
    losses = {}
    for settle in ("sweep", "backprop"):
        trainer = sft(trl, tmp_path / settle, PCGrowConfig(locus=LOCUS, settle=settle))
        assert isinstance(trainer.model, PeftModel)
        trainer.train()
        losses[settle] = logged(trainer, "loss")
    assert len(losses["sweep"]) == 4
    torch.testing.assert_close(losses["sweep"], losses["backprop"], rtol=1e-4, atol=0.0)


# ---- GradScaler, in a plain loop


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss


def test_scaled_gradients():
    """A loss scaled by a power of two gives, unscaled again, the same gradients."""
    model = grow().train()
    expected = torch.autograd.grad(loss_of(model), trainable(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.AdamW(trainable(model))
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    for parameter, gradient in zip(trainable(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_scaler_skips_a_step(fused):
    """An overflow halves the scale and skips the step without an exception; the next step goes through."""
    model = grow().train()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
    before = snapshot(model)
    scaler.scale(loss_of(model) / torch.zeros(())).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_same(before, snapshot(model))
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    after = snapshot(model)
    assert all(not torch.equal(before[name], after[name]) for name in banks(model) if "weight" in name)
