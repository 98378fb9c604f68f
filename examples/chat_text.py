"""Write chat text by the model itself: what it says before it is fine-tuned, to see later how far it still would.

    python examples/chat_text.py MODEL DIR/chat

writes DIR/chat.train.jsonl and DIR/chat.eval.jsonl, which the other examples take as `--retain` or `--unseen`. Each
text is one request in the model's chat template and its answer, drawn from the model's own distribution; none of the
requests is one of `abilities.py`. On the answers, the rise of the loss is an estimate of the divergence from the model
as it was, KL(before || after), in nats per token.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import abilities
import corpora

REQUESTS = (
    "Explain {} to a child.",
    "What should I know about {}?",
    "Write a short story about {}.",
    "Give me three tips about {}.",
    "Why do people argue about {}?",
    "My friend asked me about {}. What can I say?",
)
TOPICS = ("photosynthesis", "old bicycles", "learning to swim", "coffee", "the moon", "saving money", "chess")
TOPICS += ("bad weather", "bees", "gardening", "job interviews", "sleep", "volcanoes", "making bread", "recycling")
TOPICS += ("travelling by train", "dreams", "first aid", "museums", "running", "houseplants", "programming")
TOPICS += ("moving to a new city", "music lessons", "dinosaurs", "photography", "public speaking", "rainbows")
TOPICS += ("cooking for friends", "libraries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub name of a model with a chat template")
    add("out", metavar="DIR/NAME", type=Path)
    add("--tokens", type=int, default=160, help="of an answer, at most (default: %(default)s)")
    add("--batch", type=int, default=32, help="requests at once (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="what the model is on (default: %(default)s)")
    args = parser.parse_args()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    asked = [request.format(topic) for topic, request in product(TOPICS, REQUESTS)]
    prompts = [abilities.chat_text(tokenizer, text) for text in asked]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    found: dict[str, list[str]] = {"train": [], "eval": []}
    for start in range(0, len(prompts), args.batch):
        chosen = prompts[start : start + args.batch]
        inputs = tokenizer(chosen, add_special_tokens=False, padding=True, return_tensors="pt").to(args.device)
        with torch.no_grad():
            made = model.generate(
                **inputs,
                max_new_tokens=args.tokens,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for text, prompt, answer in zip(asked[start:], chosen, answers, strict=False):
            split = "eval" if corpora.in_split(text, "eval", one_in=2) else "train"
            found[split].append(prompt + answer)
        corpora.note(f"{start + len(chosen)} of {len(prompts)} requests")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for split, texts in found.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        args.out.with_name(f"{args.out.name}.{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
