"""A training loop of your own with accelerate: one process, or several by `accelerate launch accelerate_loop.py`."""

import argparse

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from peft_pcgrow import PCGrowConfig, measure_errors

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0924", help="of the Hub, or a folder")
parser.add_argument("--data", default="stanfordnlp/imdb", help="of the Hub, or a folder of .jsonl files, with text")
parser.add_argument("--out", default="trained", help="where the adapter goes")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--lora", action="store_true", help="the twin: LoRA, all else alike")
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2)
model = AutoModelForCausalLM.from_pretrained(args.model).to(accelerator.device)
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
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
loader = DataLoader(data, batch_size=8, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
model.train()
losses, step = [], 0
while step < args.steps:
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print(f"loss {losses[-1]:.3f}")
        if (step := step + accelerator.sync_gradients) == args.steps:
            break
accelerator.unwrap_model(model).save_pretrained(args.out, is_main_process=accelerator.is_main_process)
