"""Asks an exported model one held-out question, with transformers alone: no qtune, no peft, no bitsandbytes.

python tools/ask_exported.py MODEL ROWS.jsonl
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main(folder: str, rows: str) -> None:
    """Prints the question, the model's greedy answer and the answer that the row expects."""
    logging.disable_progress_bar()
    question, expected = json.loads(Path(rows).read_text(encoding="utf-8").splitlines()[0])["messages"][-2:]
    print(f"question  {question['content']}", flush=True)  # before seconds of loading
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"answer    {answer}")
    print(f"expected  {expected['content']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
