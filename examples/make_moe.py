"""Turn a dense checkpoint into a sparse mixture of experts, and distill the dense model into it.

    python examples/make_moe.py DENSE OUT --text DIR/NAME [--text ...] [--steps 2400]

DENSE is a Llama-like model: a folder, a GGUF file, or a name on the Hub. OUT is then a Qwen2-MoE checkpoint: that
architecture has Llama's attention, a shared expert for the neurons that every token needs, and routing weights that
sum to one, so that with all experts active the mixture is the dense model within rounding. Of each layer's MLP,

1. the neurons that contribute most on all of the text become the shared expert;
2. the others are divided among the experts by what fires together (k-means of equal clusters on their correlations);
3. the router is fitted in closed form, by ridge regression of the experts' contributions on the layer's input;
4. and so are the down projections, to make up for the experts that a token does not have;
5. all is distilled: the divergence of the mixture's predictions from the dense model's, by Adam.

Interrupted, the same command goes on. Losses are in nats per token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import corpora

ARCHITECTURES = ("llama", "mistral", "qwen2")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# spread of the routers' logits at the start: experts are ranked, and weighed nearly alike. At 0.25 the weights alone
# cost SmolLM2-135M, all of its experts active, up to 0.95 nats; at 0.02, less than 0.01
SPREAD = 0.02
FEATURES = 64
# of the products' mean diagonal, added where down projections are fitted anew
REFIT_RIDGE = 1e-2
ROUNDS = 20


def read_dense(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model in fp32 on the CPU, and its tokenizer.

    Raises:
        ValueError: it is not Llama-like. OSError: nothing there, or no tokenizer.
    """
    path, options = Path(source), {}
    if path.suffix == ".gguf":
        source, options = str(path.parent), {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(f"{source} has no tokenizer that transformers reads ({error})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError(f"{source} has no tokenizer that transformers reads (one without words comes of it)")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    config = model.config
    first = model.base_model.layers[0].mlp if config.model_type in ARCHITECTURES else None
    if (
        first is None
        or config.hidden_act != "silu"
        or any(getattr(first, name).bias is not None for name in PROJECTIONS)
    ):
        raise ValueError(
            f"{source} is {config.model_type}; expected a model of {', '.join(ARCHITECTURES)} with SiLU and MLPs "
            "without biases"
        )
    if getattr(config, "use_sliding_window", False) or (config.model_type == "mistral" and config.sliding_window):
        raise ValueError(f"{source} attends in sliding windows, which are not carried over; choose another model")
    if model.base_model.layers[0].self_attn.o_proj.bias is not None:
        raise ValueError(f"the attention of {source} has a bias at its output, which Qwen2-MoE has not")
    return model.eval(), tokenizer


def mixture_config(dense: Any, experts: int, active: int, shared: int) -> Qwen2MoeConfig:
    """The mixture's config.

    Args:
        dense: the dense model's config. experts, active: how many, and how many of them a token has.
        shared: neurons of the shared expert.

    Raises:
        ValueError: numbers that do not fit together; the nearest that do are named.
    """
    rest = dense.intermediate_size - shared
    if not 0 < active <= experts or shared < 0 or rest < experts:
        raise ValueError(f"{experts} experts, {active} active, {shared} of {dense.intermediate_size} neurons shared")
    if rest % (8 * experts):
        nearest = dense.intermediate_size - max(1, round(rest / (8 * experts))) * 8 * experts
        raise ValueError(
            f"{rest} neurons do not divide among {experts} experts into multiples of 8, which grouped products need: "
            f"try --shared {nearest}"
        )
    kept = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
    )
    kept += ("max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    kept += ("attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id")
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in kept},
        head_dim=head_dim,
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=rest // experts,
        shared_expert_intermediate_size=shared,
        num_experts=experts,
        num_experts_per_tok=active,
        norm_topk_prob=True,
        qkv_bias=dense.model_type == "qwen2" or bool(getattr(dense, "attention_bias", False)),
        router_aux_loss_coef=0.0,
    )


@torch.no_grad()
def inputs_of_mlps(model: PreTrainedModel, windows: Tensor, batch: int = 4) -> list[Tensor]:
    """What enters each layer's MLP on some windows `[N, length]`: one tensor `[tokens, H]` a layer."""
    found: list[list[Tensor]] = [[] for _ in model.base_model.layers]
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args, held=held: held.append(args[0].flatten(0, 1)))
        for layer, held in zip(model.base_model.layers, found, strict=True)
    ]
    try:
        for chunk in tqdm(windows.split(batch), desc="reading activations", unit="batch"):
            model.base_model(input_ids=chunk.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(held) for held in found]


def activations(mlp: Any, x: Tensor) -> Tensor:
    """What the neurons of a dense MLP say to inputs `[tokens, H]`, `[tokens, I]`."""
    return nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)


def contributions(mlp: nn.Module, x: Tensor) -> Tensor:
    """How far each neuron moves the MLP's output, `[tokens, I]`: its activation times the length of its column."""
    return activations(mlp, x).abs() * mlp.down_proj.weight.norm(dim=0)


def equal_clusters(vectors: Tensor, count: int, seed: int = 0) -> Tensor:
    """k-means with clusters of one size: the cluster of each of N vectors `[N, D]` of unit length.

    In each round those that prefer one cluster most over the next best choose first, among clusters with room.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(vectors) // count
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:count].to(vectors.device)]
    chosen = torch.zeros(len(vectors), dtype=torch.long)
    for _ in range(ROUNDS):
        likeness = (vectors @ centres.T).cpu()
        best = likeness.topk(min(2, count), dim=1).values
        preferred, room = likeness.argsort(dim=1, descending=True).tolist(), [size] * count
        for row in (best[:, 0] - best[:, -1]).argsort(descending=True).tolist():
            cluster = next(one for one in preferred[row] if room[one])
            chosen[row] = cluster
            room[cluster] -= 1
        sums = torch.zeros_like(centres).index_add_(0, chosen.to(vectors.device), vectors)
        centres = nn.functional.normalize(sums, dim=1)
    return chosen


def divide(amounts: Tensor, experts: int, shared: int) -> tuple[Tensor, Tensor]:
    """Which neurons are shared, `[shared]`, and which each expert gets, `[experts, size]`.

    Args:
        amounts: contributions, `[tokens, I]`.
    """
    order = amounts.square().mean(0).argsort(descending=True)
    common, rest = order[:shared].sort().values, order[shared:].sort().values
    patterns = amounts[:, rest] - amounts[:, rest].mean(0)
    patterns = nn.functional.normalize(patterns, dim=0)
    # the correlations' main directions: less to compare, and less noise
    values, directions = torch.linalg.eigh(patterns.T @ patterns)
    features = directions[:, -FEATURES:] * values[-FEATURES:].clamp_min(0).sqrt()
    clusters = equal_clusters(nn.functional.normalize(features, dim=1), experts)
    groups = torch.stack([rest[(clusters == e).to(rest.device)] for e in range(experts)])
    return common, groups


def fit_router(x: Tensor, amounts: Tensor, groups: Tensor) -> Tensor:
    """The router's weights `[experts, H]`: ridge regression of how much each expert contributes on the input.

    Args:
        x: `[tokens, H]`. amounts: `[tokens, I]`. groups: the experts' neurons, `[experts, size]`.
    """
    target = torch.stack([amounts[:, group].square().sum(1).sqrt() for group in groups], dim=1)
    # routing compares experts, so what all of them have in common is left out
    target = (target - target.mean(1, keepdim=True)).double()
    wide = x.double()
    products = wide.T @ wide
    ridge = 1e-3 * products.diagonal().mean() * torch.eye(len(products), dtype=wide.dtype, device=x.device)
    weights = torch.linalg.solve(products + ridge, wide.T @ target)
    return (weights.T * SPREAD / (wide @ weights).std().clamp_min(1e-12)).to(x.dtype)


def refit(x: Tensor, old: Any, block: Any, groups: Tensor, active: int) -> Tensor:
    """Down projections `[H, I]` that make up for the experts a token does not have: ridge regression of the dense MLP's
    output on the neurons that the router leaves, towards the dense model's own weights.

    Args:
        x: what enters, `[tokens, H]`. block: the mixture's, its router set. groups: as from `divide`.
    """
    hidden = activations(old, x)
    weights, chosen = torch.softmax(block.gate.weight.mm(x.mT).mT.float(), -1).topk(active, dim=-1)
    share = torch.zeros(len(x), len(groups), device=x.device).scatter_(1, chosen, weights / weights.sum(-1, True))
    left = torch.ones_like(hidden)
    left[:, groups.flatten()] = (active * share).repeat_interleave(groups.shape[1], dim=1).to(left.dtype)
    used, down = hidden * left, old.down_proj.weight
    products = (used.mT @ used).double()
    ridge = REFIT_RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype, device=x.device)
    missing = used.mT @ ((hidden - used) @ down.mT)
    return down + torch.linalg.solve(products + ridge, missing.double()).mT.to(x.dtype)


@torch.no_grad()
def make(dense: PreTrainedModel, windows: Tensor, experts: int, active: int, shared: int) -> Qwen2MoeForCausalLM:
    """The mixture before it is distilled; with `active == experts`, the dense model within rounding."""
    model = Qwen2MoeForCausalLM(mixture_config(dense.config, experts, active, shared)).to(dense.device).eval()
    mlps = {name for name in dense.state_dict() if ".mlp." in name}
    held = {name: tensor for name, tensor in dense.state_dict().items() if name not in mlps}
    missing = model.load_state_dict(held, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"the dense model has weights that the mixture has no place for: {missing.unexpected_keys}")
    entered = inputs_of_mlps(dense, windows)
    layers = zip(dense.base_model.layers, model.base_model.layers, entered, strict=True)
    for old, new, x in tqdm(list(layers), desc="dividing neurons", unit="layer"):
        amounts = contributions(old.mlp, x)
        common, groups = divide(amounts, experts, shared)
        gate, up, down = (getattr(old.mlp, name).weight for name in PROJECTIONS)
        block = new.mlp
        block.gate.weight.copy_(fit_router(x, amounts, groups))
        if active < experts:
            down = refit(x, old.mlp, block, groups, active)
        block.experts.gate_up_proj.copy_(torch.cat([gate[groups], up[groups]], dim=1))
        # routing weights sum to one; in the dense model each neuron counts whole
        block.experts.down_proj.copy_(down.T[groups].mT * active)
        block.shared_expert.gate_proj.weight.copy_(gate[common])
        block.shared_expert.up_proj.weight.copy_(up[common])
        # its gate starts at sigmoid(0)
        block.shared_expert.down_proj.weight.copy_(down[:, common] * 2)
        block.shared_expert_gate.weight.zero_()
    model.generation_config = dense.generation_config
    return model


class Distilling(Trainer):
    """Trains by the divergence KL(dense || mixture) of the predictions, nats per token."""

    def __init__(self, teacher: PreTrainedModel, **options: Any):
        super().__init__(**options)
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad(), self.accelerator.autocast():
            expected = log_softmax(self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits.float(), -1)
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        found = log_softmax(outputs.logits.float(), -1)
        loss = kl_div(found, expected, log_target=True, reduction="sum") / inputs["input_ids"].numel()
        return (loss, outputs) if return_outputs else loss


def distill(
    dense: PreTrainedModel, model: PreTrainedModel, windows: Tensor, folder: Path, args: argparse.Namespace
) -> None:
    """Train the mixture in place; goes on from the last checkpoint in `folder`."""
    routers = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    known = {id(p) for p in routers}
    others = [p for p in model.parameters() if id(p) not in known]
    optimizer = torch.optim.AdamW(
        # a router's logits add up over all of the input: a smaller step moves them as far
        [{"params": others, "lr": args.lr}, {"params": routers, "lr": args.lr / 10}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.02, 1 - (step - warmup) / max(1, args.steps - warmup)))
    )
    trainer = Distilling(
        dense,
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            save_steps=args.save_steps,
            save_total_limit=1,
            logging_steps=20,
            report_to=[],
            seed=args.seed,
            use_cpu=args.device == "cpu",
            bf16=args.autocast,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in windows],
        optimizers=(optimizer, schedule),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dense", metavar="DENSE", help="a folder, a .gguf file, or a name on the Hub")
    add("out", metavar="OUT", type=Path, help="folder of the mixture")
    add("--text", metavar="DIR/NAME", action="append", default=[], help="DIR/NAME.{train,eval}.jsonl; repeatable")
    add("--experts", type=int, default=16, help="experts a layer (default: %(default)s)")
    add("--active", type=int, default=8, help="of them, those of a token (default: %(default)s)")
    add("--shared", type=int, help="neurons that all tokens have (default: about a half)")
    add("--steps", type=int, default=2400, help="steps of distilling (default: %(default)s)")
    add("--batch", type=int, default=4, help="windows a step (default: %(default)s)")
    add("--length", type=int, default=128, help="tokens a window (default: %(default)s)")
    add("--lr", type=float, default=5e-4, help="peak learning rate (default: %(default)s)")
    add("--fit-windows", type=int, default=64, help="windows to divide neurons by (default: %(default)s)")
    add("--eval-windows", type=int, default=32, help="of each held-out text (default: %(default)s)")
    add("--save-steps", type=int, default=200, help="steps between checkpoints (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        help="distill in bf16 where torch.autocast does (default: not on CPUs, of which few compute faster in it)",
    )
    args = parser.parse_args()
    args.autocast = args.device != "cpu" if args.autocast is None else args.autocast
    dense, tokenizer = read_dense(args.dense)
    dense.to(args.device)
    if args.shared is None:
        step = 8 * args.experts
        args.shared = dense.config.intermediate_size - max(1, round(dense.config.intermediate_size / 2 / step)) * step
    mixture_config(dense.config, args.experts, args.active, args.shared)  # before any text is read
    texts = {
        split: {Path(spec).name: corpora.load_corpus(spec, split) for spec in args.text}
        or {"source": corpora.stdlib_source(split), "reference": corpora.language_reference(split)}
        for split in ("train", "eval")
    }
    # every corpus has the same share
    train = [corpora.windows(tokenizer, found, args.length) for found in texts["train"].values()]
    share = max(1, args.batch * args.steps // len(train))
    mixed = torch.cat([next(corpora.batches(found, min(share, len(found)), 1, args.seed)) for found in train])
    held_out = {
        name: corpora.spread(corpora.windows(tokenizer, found, args.length), args.eval_windows)
        for name, found in texts["eval"].items()
    }

    def report(model: PreTrainedModel, what: str) -> dict[str, Any]:
        row = {"model": what, **{name: corpora.evaluate(model, found) for name, found in held_out.items()}}
        corpora.emit(row, as_json=True)
        return row

    rows = [report(dense, "dense")]
    fit = torch.cat([corpora.spread(found, max(1, args.fit_windows // len(train))) for found in train])
    model = make(dense, fit, args.experts, args.active, args.shared)
    rows.append(report(model, "mixture, untrained"))
    if args.steps:
        distill(dense, model, mixed, args.out.with_name(args.out.name + "-checkpoints"), args)
        rows.append(report(model, "mixture, distilled"))
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    made = {"rows": rows, "options": {name: str(value) for name, value in vars(args).items()}, **corpora.machine()}
    (args.out / "make_moe.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
