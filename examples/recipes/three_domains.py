"""Three domains in sequence: newborns for each, gated so that neither other text nor the domains before change."""

import argparse
import random

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
parser.add_argument(
    "--data", nargs=3, default=["stanfordnlp/imdb", "fancyzhx/ag_news", "fancyzhx/yelp_polarity"], help="with text"
)
parser.add_argument("--retain", default="roneneldan/TinyStories", help="other text, which must not change")
parser.add_argument("--out", default="trained", help="where the adapters go")
parser.add_argument("--steps", type=int, default=500, help="of each domain")
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--lora", action="store_true", help="the twin: a LoRA for each domain")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(args.model)


def read(name: str):
    rows = load_dataset(name, split="train").shuffle(seed=0).select_columns("text")
    cut = {"truncation": True, "max_length": 512}
    return rows.map(lambda some: tokenizer(some["text"], **cut), batched=True, remove_columns="text")


retain, names = read(args.retain)[:256]["input_ids"], ["first", "second", "third"]
for number, name in enumerate(names):
    data = read(args.data[number])
    if args.lora:
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    else:
        emap = measure_errors(model, data, retain=retain, max_tokens=131_072)
        config = PCGrowConfig(error_map=emap, budget=0.12, grow="spawn", gate_fpr=0.05, protect=0.8)
    if number:
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, name)
    model.base_model.set_adapter(names[: number + 1])
    model.set_requires_grad(names[:number], False)
    settings = TrainingArguments(args.out, max_steps=args.steps, learning_rate=args.lr, report_to="none")
    words = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model=model, args=settings, train_dataset=data, data_collator=words).train()
    retain += data[:128]["input_ids"]  # the next domain must not change this one
    random.shuffle(retain)
model.save_pretrained(args.out)
