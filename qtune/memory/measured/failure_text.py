"""What a user reads when memory has run out; drawn from the record in memory.json, at once and again later."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from qtune.sizes import size_text, texts_apart

Json = Mapping[str, Any]

WHERE = {
    "load": "while the model was loaded",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer step",
    "eval": "in the evaluation",
    "save": "while saving",
    "idle": "between two steps",
}
"""Phases in words; the step of the last four is done, but for the optimizer's."""


def failure_text(report: Json) -> str:
    """The whole report, a fact a line."""
    return "\n".join([_headline(report), *_alive(report), *_predicted(report), *_free(report), *_offers(report)])


def _headline(report: Json) -> str:
    words = WHERE[report["phase"]]
    if report["step"]:
        words += f" {'after' if report['phase'] in ('eval', 'save', 'idle') else 'of'} step {report['step']}"
    if report["batch"]:
        words += f", at {report['batch']['rows']} x {report['batch']['length']} tokens"
    return f"memory ran out {words}: {report['said']}"


def _alive(report: Json) -> Iterator[str]:
    if report["alive"]:
        listed = ", ".join(f"{name} {size_text(value)}" for name, value in report["alive"].items())
        yield f"alive ({report['counted']}): {listed}"


def _predicted(report: Json) -> Iterator[str]:
    if (expected := report["predicted"]) is None:
        return
    needed, available = expected["needed_bytes"], report["available_bytes"]
    needs, there = texts_apart(needed, available)
    verdict = (
        f"more than the {there} that were to be had"
        if needed > available
        else f"less than the {there} that were to be had, so it was too low, or memory was taken meanwhile"
    )
    yield (
        f"predicted for {expected['rows']} x {expected['length']} tokens: {size_text(expected['phase_bytes'])} here, "
        f"{size_text(expected['peak_bytes'])} at the step's peak, {needs} with driver and "
        f"allocator: {verdict}"
    )


def _free(report: Json) -> Iterator[str]:
    yield (
        f"{report['device']}: {size_text(report['free_bytes'])} of {size_text(report['total_bytes'])} free, "
        f"{size_text(report['own_bytes'])} held by this run"
    )
    if report["others"]:
        listed = ", ".join(
            f"{one['name'] or 'a process'} (pid {one['pid']}) "
            + ("of unknown size" if one["bytes"] is None else size_text(one["bytes"]))
            for one in report["others"]
        )
        yield f"also on it: {listed}"


def _offers(report: Json) -> Iterator[str]:
    offers = report["offers"]
    if report["untraced"]:
        yield f"what would have fit is not known: {report['untraced']}"
    elif not offers and report["least_bytes"]:
        least = report["least_bytes"]
        if least > report["available_bytes"]:
            reason = f"the least that one of them needs is {size_text(least)}"
        else:
            reason = "none saves here what was missing"
        yield f"no change of the recipe would have fit: {reason}"
        if report["batch"]:
            yield "shorter rows need less: qtune fit with --allow length says how short"
    for number, one in enumerate(offers):
        if not number:
            yield "would have fit, least harm first, each traced:"
        peak, needed = size_text(one["peak_bytes"]), size_text(one["needed_bytes"])
        yield f"  {one['change']}: {peak} at the peak, {needed} needed; {one['why']}"
        yield f"    {one['command']}{'  (a new run: it decides what is learned)' if one['is_new_run'] else ''}"
    saved = f"saved is {report['saved']}" if report["saved"] else "no step is saved yet"
    yield f"{saved}; with more memory free, as it was: {shlex.join(['qtune', 'run', '--resume', report['run']])}"
