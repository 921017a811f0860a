"""Next-token logits of one row."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel


@torch.inference_mode()
def logits_of(model: PreTrainedModel | PeftModel, ids: Sequence[int]) -> Tensor:
    """Logits [length, vocab] in fp32 on the CPU; those of the virtual tokens that peft puts before are cut off."""
    tensor = torch.tensor([list(ids)], device=model.device)
    logits: Tensor = model(input_ids=tensor, attention_mask=torch.ones_like(tensor), use_cache=False).logits[0]
    return logits[-len(ids) :].float().cpu()
