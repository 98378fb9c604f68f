"""transformers' Trainer on plain text."""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from peft_pcgrow import PCGrowConfig, measure_errors

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0924", help="of the Hub, or a folder")
parser.add_argument("--data", default="stanfordnlp/imdb", help="of the Hub, or a folder of .jsonl files, with text")
parser.add_argument("--out", default="trained", help="where the adapter goes")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--lora", action="store_true", help="the twin: LoRA, all else alike")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(args.model)
data = load_dataset(args.data, split="train").shuffle(seed=0)
data = data.map(
    lambda rows: tokenizer(rows["text"], truncation=True, max_length=512),
    batched=True,
    remove_columns=data.column_names,
)

if args.lora:
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
else:
    config = PCGrowConfig(error_map=measure_errors(model, data, max_tokens=131_072), budget=0.12)

model = get_peft_model(model, config)
trainer = Trainer(
    model=model,
    args=TrainingArguments(args.out, max_steps=args.steps, learning_rate=args.lr, logging_steps=1, report_to="none"),
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
model.save_pretrained(args.out)
