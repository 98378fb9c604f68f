"""What was grown, on experts that are shared out over processes (transformers' expert and tensor parallelism).

    torchrun --nproc-per-node 8 examples/recipes/expert_parallel/serve.py --model MODEL --adapter FOLDER --out MERGED

The adapter, trained on any number of processes, is merged here by the first one, and the plain checkpoint that this
makes is loaded by all with their share of the experts.
"""

import argparse

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import peft_pcgrow  # noqa: F401 (lets PEFT read the adapter)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="of the Hub, or a folder: what the adapter was trained on")
parser.add_argument("--adapter", required=True, help="its folder; of deepened experts (newborns cannot be merged)")
parser.add_argument("--out", required=True, help="where the merged model goes")
parser.add_argument("--prompt", default="The")
parser.add_argument("--tokens", type=int, default=32)
args = parser.parse_args()

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
tokenizer = AutoTokenizer.from_pretrained(args.model)
if dist.get_rank() == 0:
    whole = AutoModelForCausalLM.from_pretrained(args.model)
    PeftModel.from_pretrained(whole, args.adapter).merge_and_unload().save_pretrained(args.out)
dist.barrier()
size = dist.get_world_size()
model = AutoModelForCausalLM.from_pretrained(args.out, distributed_config=DistributedConfig(tp_size=size, ep_size=size))
given = tokenizer(args.prompt, return_tensors="pt").to(model.device)
written = model.generate(**given, max_new_tokens=args.tokens, do_sample=False)
if dist.get_rank() == 0:
    print(tokenizer.decode(written[0], skip_special_tokens=True))
dist.destroy_process_group()
