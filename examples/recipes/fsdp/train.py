"""Deepen a model that FSDP2 shards over GPUs, by a map measured before; one ordinary adapter is saved.

    accelerate launch --config_file examples/recipes/fsdp/fsdp2.yaml examples/recipes/fsdp/train.py MODEL TEXTS MAP OUT

MODEL: a name or folder. TEXTS: a JSON Lines file with "text". MAP: what `measure_errors(...).save` wrote, in a run of
its own, on one device, by device_map, or of a base that fully_shard has split. OUT: where the adapter goes. Under bf16
the banks stay in fp32 between steps. --resume goes on from the newest whole checkpoint in OUT, also on another number
of GPUs.
"""

import argparse
from typing import Any

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from peft_pcgrow import Muon, PCGrowConfig, create_pcgrow_optimizer
from peft_pcgrow.training.checkpoints import last_checkpoint


class MuonTrainer(Trainer):
    """Under FSDP a Trainer takes no optimizer that was made before it."""

    def create_optimizer(self, model: Any = None) -> Muon:
        self.optimizer = create_pcgrow_optimizer(model or self.model, lr=self.args.learning_rate)
        return self.optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "texts", "map", "out"):
        parser.add_argument(name)
    parser.add_argument("--budget", type=float, default=0.12, help="share of the experts to grow (default: 0.12)")
    parser.add_argument("--lr", type=float, default=0.01, help="of Muon (default: 0.01; find_lr finds one before)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    model = get_peft_model(model, PCGrowConfig(error_map=args.map, budget=args.budget))
    texts = load_dataset("json", data_files=args.texts, split="train")
    texts = texts.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=1024), batched=True)
    how = TrainingArguments(args.out, max_steps=args.steps, learning_rate=args.lr, save_steps=50, report_to="none")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = MuonTrainer(model, how, train_dataset=texts.select_columns(["input_ids"]), data_collator=collator)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.out) if args.resume else None)
    # all processes gather, the first one writes
    trainer.model.save_pretrained(args.out, is_main_process=trainer.is_world_process_zero())


if __name__ == "__main__":
    main()
