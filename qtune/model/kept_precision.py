"""Which parameters a model's class keeps in fp32 whatever it is loaded in: routers' corrections, some norms."""

import re
from collections.abc import Callable

import torch
from transformers import PreTrainedModel


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether the parameter of a name stays in fp32 where the model is loaded in `dtype`.

    The patterns are searched for in the name, and a "*" in one stands for any text, as transformers 5.23 does on
    loading (core_model_loading.py, `build_glob_alternation`).
    """
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    return lambda name: any(pattern.search(name) for pattern in patterns)
