"""The end of `qtune run`: what came of it, and what to do next."""

from typing import TYPE_CHECKING

from qtune.console import clock
from qtune.sizes import size_text

if TYPE_CHECKING:
    from qtune.run.summary import Summary


def summary_text(summary: "Summary") -> str:
    """Where the run is, its losses, time and memory, and the commands that go on from it."""
    path = summary.run_dir.path
    lines = [f"{path}: {summary.steps:,} steps in {clock(summary.seconds)}{_memory(summary)}"]
    if summary.losses is not None:
        lines.append(f"training loss {summary.losses.start:.4f} -> {summary.losses.end:.4f} (first and last tenth)")
    best = summary.best
    if best is not None:
        last = summary.validation[-1]
        at = "" if last.step == best.step else f"; the best was {best.loss:.4f} at step {best.step}"
        lines.append(f"validation loss {last.loss:.4f}, accuracy {last.accuracy:.1%}{at}")
    if summary.adapter_step is not None:
        lines.append(f"the adapter is the state of step {summary.adapter_step}")
    width = max(len(verb) for verb, _ in NEXT) + len(f"qtune  {path}")
    lines += [f"  {f'qtune {verb} {path}':<{width}} {does}" for verb, does in NEXT]
    return "\n".join(lines)


NEXT = (
    ("eval", "base against tuned on held-out rows"),
    ("chat", "talk to it"),
    ("export", "a plain model for transformers, vLLM and Ollama"),
)


def _memory(summary: "Summary") -> str:
    return f", memory peak {size_text(summary.peak_bytes)}" if summary.peak_bytes else ""
