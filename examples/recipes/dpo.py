"""TRL's DPOTrainer on preferences; the reference is the base, the same model with the adapter off."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from peft_pcgrow import PCGrowConfig, measure_errors

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B-Instruct-2507", help="of the Hub, or a folder")
parser.add_argument(
    "--data", default="trl-lib/ultrafeedback_binarized", help="of the Hub, or a folder of .jsonl files, with talks"
)
parser.add_argument("--out", default="preferring", help="where the adapter goes")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--lr", type=float, default=1e-5)
parser.add_argument("--lora", action="store_true", help="the twin: LoRA, all else alike")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(args.model)
data = load_dataset(args.data, split="train").shuffle(seed=0).select_columns(["chosen", "rejected"])

if args.lora:
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
else:
    chosen = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in data[:256]["chosen"]]
    emap = measure_errors(model, chosen, tokenizer=tokenizer, max_tokens=131_072)
    config = PCGrowConfig(error_map=emap, budget=0.12)

trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        args.out,
        max_steps=args.steps,
        learning_rate=args.lr,
        per_device_train_batch_size=4,
        max_length=512,
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
