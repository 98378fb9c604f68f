"""TRL's GRPOTrainer: the model writes, a function rewards (here: how near to 60 words the answer is)."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from peft_pcgrow import PCGrowConfig, measure_errors

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0924", help="of the Hub, or a folder")
parser.add_argument("--data", default="trl-lib/tldr", help="of the Hub, or a folder of .jsonl files, with prompts")
parser.add_argument("--out", default="rewarded", help="where the adapter goes")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--lr", type=float, default=1e-5)
parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
parser.add_argument("--lora", action="store_true", help="the twin: LoRA, all else alike")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(args.model)
data = load_dataset(args.data, split="train").shuffle(seed=0).select_columns("prompt")

if args.lora:
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
else:
    emap = measure_errors(model, data[:256]["prompt"], tokenizer=tokenizer, max_tokens=131_072)
    config = PCGrowConfig(error_map=emap, budget=0.12)


def near_60_words(completions: list[str], **_) -> list[float]:
    return [-abs(len(text.split()) - 60) / 60 for text in completions]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=near_60_words,
    args=GRPOConfig(
        args.out,
        max_steps=args.steps,
        learning_rate=args.lr,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=args.tokens,
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=config,
)
trainer.train()
trainer.save_model(args.out)
