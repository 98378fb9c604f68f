"""DeepSpeed's ZeRO-2 through transformers' Trainer: gradients and the optimizer's states are shared out over processes.

    torchrun --nproc-per-node 8 examples/recipes/deepspeed/train.py --model MODEL --data FOLDER

The map is measured before, each process on its share of the text. Muon and protect= step whole matrices, which ZeRO
flattens: they are refused here, and train under DDP.
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from peft_pcgrow import PCGrowConfig, measure_errors

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0924", help="of the Hub, or a folder")
parser.add_argument("--data", default="stanfordnlp/imdb", help="of the Hub, or a folder of .jsonl files, with text")
parser.add_argument("--out", default="trained", help="where the adapter goes")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--lr", type=float, default=1e-4)
args = parser.parse_args()

settings = TrainingArguments(
    args.out,
    deepspeed=str(Path(__file__).with_name("zero2.json")),
    max_steps=args.steps,
    learning_rate=args.lr,
    bf16=torch.cuda.is_available(),
    logging_steps=1,
    report_to="none",
)
state = PartialState()
model = AutoModelForCausalLM.from_pretrained(args.model).to(state.device)
tokenizer = AutoTokenizer.from_pretrained(args.model)
data = load_dataset(args.data, split="train").shuffle(seed=0)
data = data.map(
    lambda rows: tokenizer(rows["text"], truncation=True, max_length=512),
    batched=True,
    remove_columns=data.column_names,
)
share = data.shard(state.num_processes, state.process_index)
emap = measure_errors(model, share, max_tokens=131_072)  # of all processes together
model = get_peft_model(model, PCGrowConfig(error_map=emap, budget=0.12))
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model=model, args=settings, train_dataset=data, data_collator=collator)
trainer.train()
trainer.save_model(args.out)
