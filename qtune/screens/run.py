"""The end of `qtune run`: what came of it, and what to do next."""

import shlex
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from qtune.console import clock
from qtune.screens.commands import commands_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qtune.run.summary import Summary


def summary_text(summary: "Summary") -> str:
    """Where the run is, its time and losses, and the commands that go on from it; a verdict says its memory."""
    path = summary.run_dir.path
    lines = [f"{path}: {summary.steps_taken} in {clock(summary.seconds)}"]
    if summary.losses is not None:
        lines.append(f"training loss {summary.losses.text}")
    best = summary.best
    if best is not None:
        last = summary.validation[-1]
        at = "" if last.step == best.step else f"; the best was {best.judged_loss:.4f} at step {best.step}"
        lines.append(f"validation loss {last.judged_loss:.4f}{last.about_rows}, {last.accuracy_text}{at}")
    if summary.adapter_step is not None:
        lines.append(f"the adapter is the state of step {summary.adapter_step}")
    lines.append(commands_text([(["qtune", verb, str(path)], does) for verb, does in NEXT]))
    return "\n".join(lines)


def spread_text(summaries: "Sequence[Summary]") -> str:
    """How far apart the runs of one recipe with several seeds ended, and the command that compares them on rows."""
    lines = [f"{len(summaries)} runs that differ by their seed alone:"]
    looked = [one.validation[-1] for one in summaries if one.validation]
    of_rows = " of rows that training has not seen" if any(one.left_out for one in looked) else ""
    measured = {
        "training loss": [one.losses.end for one in summaries if one.losses is not None],
        f"validation loss{of_rows}": [one.judged_loss for one in looked],
    }
    of_all = {name: losses for name, losses in measured.items() if len(losses) == len(summaries)}
    for at, one in enumerate(summaries):
        each = ", ".join(f"{name.removesuffix(of_rows)} {losses[at]:.4f}" for name, losses in of_all.items())
        lines.append(f"  {one.run_dir.name}: {each or 'no loss was logged'}")
    for name, losses in of_all.items():
        lines.append(f"{name}: mean {fmean(losses):.4f}, standard deviation over seeds {stdev(losses):.4f}")
    lines.append(f"  {shlex.join(['qtune', 'compare', *(str(one.run_dir.path) for one in summaries)])}")
    return "\n".join(lines)


NEXT = (
    ("eval", "base against tuned on held-out rows"),
    ("chat", "talk to it"),
    ("export", "a plain model for transformers, vLLM and Ollama"),
)
