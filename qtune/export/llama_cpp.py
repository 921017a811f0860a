"""What llama.cpp and what is built on it do with an export otherwise than transformers."""

from transformers import PretrainedConfig

ADAPTER_FILE = "adapter.gguf"
"""LoRA on its own, for --lora."""


def ignored_window(config: PretrainedConfig) -> int | None:
    """The sliding window that llama.cpp does not apply to this family: beyond so many tokens it answers otherwise."""
    if config.model_type not in ("mistral", "qwen2", "qwen3", "phi3"):
        return None
    window = getattr(config, "sliding_window", None)
    return window if window and window < config.max_position_embeddings else None
