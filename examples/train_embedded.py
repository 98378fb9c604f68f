"""Train the small mixture-of-experts model that the examples start from, and its tokenizer, from nothing.

The text is the training split of the running Python's standard library, so the result depends on its version.
The model learns Python source and meets little prose, which leaves something for the examples to teach it.

    python examples/train_embedded.py --threads 1

Losses and entropies are in nats per token.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import corpora

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` tokens, the end-of-text token being number 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocabulary:
        raise ValueError(f"the texts give {found} tokens, {vocabulary} were asked for; pass --vocab {found}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def new_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """About four million parameters, under 10 MB in bfloat16."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=320,  # of dense layers, of which there are none
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Learning rate of a step counted from 0: linear warmup to `peak`, then a cosine to a fiftieth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def balance_loss(router_logits: tuple[torch.Tensor, ...], config: Qwen3MoeConfig) -> torch.Tensor:
    """Weighted sum over layers of how unevenly experts are used; logits ``[tokens, experts]`` a layer.

    The model's own router loss pools the layers, so one may leave experts idle that another keeps busy.
    """
    total = router_logits[0].new_zeros(())
    for logits in router_logits:
        chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
        shares = torch.bincount(chosen, minlength=config.num_experts) / chosen.numel()
        total = total + config.num_experts * (shares * logits.softmax(dim=-1).mean(dim=0)).sum()
    return config.router_aux_loss_coef * total


def train(model: Qwen3MoeForCausalLM, windows: torch.LongTensor, args: argparse.Namespace) -> None:
    """Train `model` in place on windows ``[N, length]``."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]  # norm scales, which decay would only shrink
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), foreach=True)
    model.train()
    start = time.perf_counter()
    mean = 0.0
    for step, ids in enumerate(corpora.batches(windows, args.batch, args.steps, args.seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, args.warmup, args.lr)
        output = model(input_ids=ids, output_router_logits=True, use_cache=False)
        loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (loss + balance_loss(output.router_logits, model.config)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            pace = (time.perf_counter() - start) / (step + 1)
            corpora.note(f"step {step + 1}/{args.steps}  loss {mean:.3f}  {pace:.3f} s/step")


@torch.no_grad()
def expert_shares(model: Qwen3MoeForCausalLM, windows: torch.LongTensor) -> torch.Tensor:
    """Share of the routed tokens that each expert takes: ``[layers, experts]``, each row adding up to 1."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for chunk in windows.split(16):
        layers = model(input_ids=chunk, output_router_logits=True, use_cache=False).router_logits
        for layer, logits in enumerate(layers):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=config.num_experts)
    return counts / counts.sum(dim=1, keepdim=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", metavar="PATH", type=Path, default=corpora.EMBEDDED_MODEL, help="folder to write")
    add("--steps", type=int, default=4400, help="optimizer steps (default: %(default)s)")
    add("--warmup", type=int, default=150, help="steps of rising learning rate (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    add("--batch", type=int, default=8, help="windows a step (default: %(default)s)")
    add("--length", type=int, default=192, help="tokens a window (default: %(default)s)")
    add("--vocab", type=int, default=4096, help="tokens in the vocabulary (default: %(default)s)")
    add("--eval-windows", type=int, default=256, help="windows of each held-out text (default: %(default)s)")
    add("--seed", type=int, default=0, help="of initial weights and window order (default: %(default)s)")
    add("--threads", type=int, default=None, help="processor threads (default: torch's own choice)")
    add("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    torch.manual_seed(args.seed)

    texts = corpora.stdlib_source("train")
    tokenizer = train_tokenizer(texts, args.vocab)
    train_windows = corpora.windows(tokenizer, texts, args.length)
    held_out, reference = (
        corpora.spread(corpora.windows(tokenizer, read("eval"), args.length), args.eval_windows)
        for read in (corpora.stdlib_source, corpora.language_reference)
    )
    seconds = time.perf_counter() - begin
    corpora.note(f"{len(texts)} files, {train_windows.numel()} tokens, read in {seconds:.1f} s")

    model = Qwen3MoeForCausalLM(new_config(tokenizer))
    started = time.perf_counter()
    train(model, train_windows, args)
    trained = time.perf_counter() - started

    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    # What the examples load is what is measured: the weights as rounded and saved.
    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    for layer, shares in enumerate(expert_shares(model, held_out)):
        busiest, idlest, even = shares.max(), shares.min(), 1 / len(shares)
        corpora.note(f"layer {layer}: busiest expert {busiest:.3f}, idlest {idlest:.3f} (even: {even:.3f})")
    corpora.emit(
        {
            "source_loss": corpora.evaluate(model, held_out),
            "source_unigram_entropy": corpora.unigram_entropy(held_out),
            "reference_loss": corpora.evaluate(model, reference),
            "reference_unigram_entropy": corpora.unigram_entropy(reference),
            "source_windows": len(held_out),
            "reference_windows": len(reference),
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": sum(path.stat().st_size for path in args.output.iterdir()),
            "steps": args.steps,
            "tokens": args.steps * args.batch * args.length,
            "train_seconds": round(trained, 1),
            "seconds_per_step": round(trained / args.steps, 4) if args.steps else 0.0,
            "seed": args.seed,
            **corpora.machine(),
        },
        args.json,
    )


if __name__ == "__main__":
    main()
