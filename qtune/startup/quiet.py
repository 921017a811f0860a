"""Third-party noise that is not the user's: progress bars, banners and warnings of the libraries we call."""

import logging
import os
import warnings

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "huggingface_hub")


def quiet_libraries() -> None:
    """Turns the noise off for this process and its children; QTUNE_VERBOSE=1 leaves it on. Imports none of them."""
    if os.environ.get("QTUNE_VERBOSE") == "1":
        return
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRL_EXPERIMENTAL_SILENCE"):
        os.environ.setdefault(name, "1")
    # transformers 5.23 reads GGUF files under a bar that its own switch does not reach.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Rows are tokenized before a data loader forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for library in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
        logging.getLogger(library).setLevel(logging.ERROR)


def quiet_loading() -> None:
    """Turns off the bars that transformers draws while it loads weights; it must be imported to be told."""
    if os.environ.get("QTUNE_VERBOSE") == "1":
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
