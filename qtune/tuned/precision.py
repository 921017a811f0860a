"""A tuned model computes as it was trained: under autocast to the run's 16-bit dtype, where it has one."""

from contextlib import AbstractContextManager, nullcontext

import torch

from qtune.plan import Plan


def training_autocast(plan: Plan | None) -> AbstractContextManager[object]:
    """Autocast as in the training step; nothing for float32, or for a model that no run has trained (None).

    Without it adapters in float32 hand float32 on to a model in 16 bits: slowly for LoRA, and IA3's layers on a 4-bit
    base give attention a query and a key of different dtypes (peft 0.21, tuners/ia3/bnb.py), which is an error.
    """
    if plan is None or plan.compute_dtype == "float32":
        return nullcontext()
    return torch.autocast(plan.device.kind, getattr(torch, plan.compute_dtype))
