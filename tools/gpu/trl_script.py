"""TRL as it comes, on the rows of the measured runs: trl_script.py MODEL ROWS.jsonl LENGTH BATCH STEPS

The script that a competent user writes today: NF4 with double quantization, LoRA rank 16 on every linear layer,
gradient checkpointing, SFTTrainer, every default of TRL left alone. Prints one line of JSON: what a step took.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

WARM_UP = 3
"""Steps that are not counted: kernels are chosen in them."""


class Stopwatch(TrainerCallback):
    """Seconds of each step, from the moment when the card is idle to the next such moment."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self._since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._since)


def main() -> None:
    folder, file = sys.argv[1:3]
    length, batch, steps = map(int, sys.argv[3:6])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    ids = [tokenizer(json.loads(line)["text"])["input_ids"][:length] for line in lines]
    ids = [row for row in ids if len(row) == length]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": 0}
    )
    config = SFTConfig(
        output_dir="trl-output",
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=1e-4,
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=length,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    watch = Stopwatch()
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[watch],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    free, total = torch.cuda.mem_get_info()
    seconds = statistics.median(watch.seconds[WARM_UP:])
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    print(
        json.dumps(
            {
                "what": f"TRL as it comes, {folder.rstrip('/').rpartition('/')[2]} {batch} x {length}",
                "seconds_per_step": round(seconds, 4),
                "tokens_per_second": round(length * batch / seconds, 1),
                "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
                "device_used_bytes": total - free,
                "trained_parameters": sum(parameter.numel() for parameter in trained),
                "adapter_dtype": str(trained[0].dtype).removeprefix("torch."),
            }
        )
    )


if __name__ == "__main__":
    main()
