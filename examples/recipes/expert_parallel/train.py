"""Deepen a model whose experts transformers' expert parallelism shares out over processes.

    torchrun --nproc-per-node 8 examples/recipes/expert_parallel/train.py --model MODEL --data TEXTS --out FOLDER

What grows of an expert is where that one is, in its process alone. All processes read the same batches. What is saved
is an ordinary adapter, for any number of processes.
"""

import argparse
from itertools import chain, repeat

import torch
import torch.distributed as dist
from datasets import load_dataset
from peft import get_peft_model
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from transformers.distributed import DistributedConfig

from peft_pcgrow import PCGrowConfig, create_pcgrow_optimizer, measure_errors

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="of the Hub, or a folder")
parser.add_argument("--data", required=True, help="of the Hub, or a folder of .jsonl files, with text")
parser.add_argument("--out", default="trained", help="where the adapter goes")
parser.add_argument("--budget", type=float, default=0.12, help="share of the experts to grow")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--lr", type=float, default=0.01, help="of Muon")
args = parser.parse_args()

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
size, first = dist.get_world_size(), dist.get_rank() == 0
shared = DistributedConfig(tp_size=size, ep_size=size)
model = AutoModelForCausalLM.from_pretrained(args.model, distributed_config=shared)
tokenizer = AutoTokenizer.from_pretrained(args.model)
# the same order, and no DistributedSampler: every process needs every batch
data = load_dataset(args.data, split="train").shuffle(seed=0)
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=512), batched=True)
data = data.select_columns(["input_ids", "attention_mask"])
emap = measure_errors(model, data, max_tokens=131_072, progress=first)

model = get_peft_model(model, PCGrowConfig(error_map=emap, budget=args.budget)).train()
optimizer = create_pcgrow_optimizer(model, lr=args.lr)
loader = DataLoader(data, batch_size=8, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
for step, batch in zip(range(1, args.steps + 1), chain.from_iterable(repeat(loader)), strict=False):
    loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
    loss.backward()
    clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if first:
        print(f"step {step}: loss {float(loss):.3f}")
# all processes gather, the first one writes; given nothing, PEFT gathers the base too
own = {name: held for name, held in model.state_dict().items() if "pcgrow" in name}
model.save_pretrained(args.out, state_dict=own, is_main_process=first)
dist.destroy_process_group()
