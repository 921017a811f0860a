"""Compared runs -> one line a configuration: its runs with different seeds together, each figure with its interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from qtune.comparing.bootstrap import Drawn, Interval, drawn, weighted_mean
from qtune.comparing.runs import ComparedRun
from qtune.comparing.tasks import TaskLine, task_lines
from qtune.console import clock
from qtune.recipe.steps import FEWEST
from qtune.records import plain
from qtune.run.summary import number
from qtune.sizes import gib_text
from qtune.tuned.evaluation import NO_ANSWERS, leaves_out
from qtune.verdicts.scores import answer_scores


@dataclass(frozen=True)
class Measure:
    """A figure of a configuration: its mean over rows and runs, its spread, and the difference to the first one's.

    by_run: each run's own mean. by_seed: that of the runs with each seed: the same run twice says nothing of chance.
    change: None for the first configuration itself.
    """

    interval: Interval
    by_run: tuple[float, ...]
    by_seed: tuple[float, ...]
    change: Interval | None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None of a single one."""
        return stdev(self.by_seed) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class Configuration:
    """A configuration. `answers` is None where nothing was asked."""

    name: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    adapter: str
    parameters: int
    seconds: float
    peak_bytes: int
    devices: tuple[str, ...]
    loss: Measure
    answers: Measure | None
    forgotten: Measure
    """By how many nats per token the loss on the neutral text rose."""
    training_losses: tuple[float | None, ...]
    """That each run ended with (`run.summary.Losses.end`)."""


@dataclass(frozen=True)
class Base:
    """A base as it was trained on: quantized otherwise it answers otherwise. answers: None where nothing was asked."""

    name: str
    quantization: str
    loss: float
    answers: float | None
    neutral_loss: float
    """On the text by which forgetting is measured."""


@dataclass(frozen=True)
class SideBySide:
    """Configurations, and the bases that they began with, in the order in which they were named."""

    lines: tuple[Configuration, ...]
    bases: tuple[Base, ...]
    rows: int
    source: str
    scored_tokens: int
    """Of the first run."""
    answers_name: str | None
    are_free: bool = False
    """Whether the answers are scored by how like the expected ones they are, from 0 to 1; else it is a share."""
    tasks: tuple[TaskLine, ...] = ()
    tasks_left_out: str | None = None
    """Why what benchmarks said of some runs is in none of the lines."""
    rows_trained_on: dict[str, int] = field(default_factory=dict)
    """Of each run that saw some of the rows' prompts in training: of how many."""
    left_out: int = 0
    """Rows that were asked and that no figure is about, for training of one of the runs saw their prompts."""
    seen_unknown: dict[str, str] = field(default_factory=dict)
    """Of each run of which it is not known which of the rows it saw: why."""
    ended_early: dict[str, str] = field(default_factory=dict)
    """Of each run that has ended before all its steps were taken: how many it took, as "2 of 12 steps"."""
    loss_per: Literal["token", "row"] = "token"
    """What a loss is the mean of: scored tokens, or whole rows where the runs make other tokens of them."""
    answers_cut: int = 0
    """Rows whose expected answer is longer than what was generated, so that they cannot match."""

    @property
    def asked(self) -> str:
        """What the figures are about, as a title."""
        tokens = f", {self.scored_tokens} scored tokens" if self.loss_per == "token" else ""
        return f"{self.rows} {self.source}{tokens}"

    def to_json(self) -> dict[str, Any]:
        """What --json prints."""
        values: dict[str, Any] = plain(self)
        return values


def compare(runs: Sequence[ComparedRun]) -> SideBySide:
    """One line a configuration; all of them compared with the first, on the rows that training of none has seen."""
    asked = runs
    runs, seen_rows = _on_unseen_rows(asked)
    groups: list[list[ComparedRun]] = []
    for run in runs:
        same = next((group for group in groups if group[0].settings == run.settings), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    lines: list[Configuration] = []
    first: dict[str, Drawn] = {}
    evaluation = runs[0].evaluation
    tokens = [[row.tokens for row in run.evaluation.row_losses] for run in runs]
    by_row = any(own != tokens[0] for own in tokens)
    for salt, group in enumerate(groups):
        lines.append(_line(group, salt, first, by_row))
    scores = answer_scores(evaluation)
    tasks, left_out = task_lines(groups)
    return SideBySide(
        tuple(lines),
        _bases(runs, by_row),
        evaluation.rows,
        evaluation.source,
        evaluation.scored_tokens,
        scores.name if scores else None,
        scores is not None and scores.is_free,
        tasks,
        left_out,
        {run.run: run.evaluation.rows_trained_on for run in asked if run.evaluation.rows_trained_on},
        seen_rows,
        {run.run: run.evaluation.seen_unknown for run in asked if run.evaluation.seen_unknown is not None},
        {run.run: run.ended_early for run in runs if run.ended_early is not None},
        "row" if by_row else "token",
        max(run.evaluation.answers_cut for run in runs),
    )


def _on_unseen_rows(runs: Sequence[ComparedRun]) -> tuple[list[ComparedRun], int]:
    """The runs with what their evaluations say of the rows that training of none of them saw, and how many others there
    are; where hardly any are left, with all rows and 0."""
    tables = [run.evaluation.row_losses for run in runs]
    is_seen = [any(one.is_seen for one in row) for row in zip(*tables, strict=True)]
    out = leaves_out(is_seen, [row.tokens for row in tables[0]])
    if not any(out) and not any(run.evaluation.left_out for run in runs):
        return list(runs), 0
    asked = [any(one.is_seen for one in row) for row in zip(*(run.evaluation.comparisons for run in runs), strict=True)]
    out_of_answers = [any(out) and seen for seen in asked]

    def narrowed(run: ComparedRun) -> ComparedRun:
        kept = run.evaluation
        rows = tuple(row for row, is_out in zip(kept.row_losses, out, strict=True) if not is_out)
        answers = tuple(row for row, is_out in zip(kept.comparisons, out_of_answers, strict=True) if not is_out)
        scored = sum(row.tokens for row in rows)
        found = replace(
            kept,
            rows=kept.rows - sum(out),
            left_out=0,
            scored_tokens=scored,
            base=replace(kept.base, loss=sum(row.tokens * row.base for row in rows) / scored),
            row_losses=rows,
            comparisons=answers,
        )
        return replace(run, evaluation=found)

    return [narrowed(run) for run in runs], sum(out)


def _bases(runs: Sequence[ComparedRun], by_row: bool) -> tuple[Base, ...]:
    """One of each name and quantization; those of one model in two folders have the same figures, and one line. by_row:
    as `_line`'s."""
    found: dict[tuple[Any, ...], Base] = {}
    for run in runs:
        quantization = run.settings["quantization"]
        scores = answer_scores(run.evaluation)
        rows = run.evaluation.row_losses
        loss = fmean(row.tokens * row.base for row in rows) if by_row else run.evaluation.base.loss
        figures = loss, fmean(scores.base) if scores else None, run.forgetting.base
        names = run.base, tuple(sorted(quantization.items()))
        if names not in found and figures not in found:
            found[names] = found[figures] = Base(run.base, quantization["kind"], *figures)
    return tuple({id(base): base for base in found.values()}.values())


def _name_of(group: Sequence[ComparedRun]) -> str:
    """Of one run its folder's name; of several what theirs have in common, and their seeds: "recipe, seeds 42 and 43"
    for recipe-seed42 and recipe-seed43. Runs that are called otherwise are named one by one."""
    names = [Path(run.run).resolve().name for run in group]
    if len(names) == 1:
        return names[0]
    stems = {name.removesuffix(f"-seed{run.seed}") for name, run in zip(names, group, strict=True)}
    *others, last = [str(run.seed) for run in group] if len(stems) == 1 else names
    several = f"{', '.join(others)} and {last}"
    return f"{stems.pop()}, seeds {several}" if len(stems) == 1 else several


def _line(group: Sequence[ComparedRun], salt: int, first: dict[str, Drawn], by_row: bool) -> Configuration:
    """first: what the first line has drawn, which it puts there. by_row: a row's loss is the sum of its tokens'."""

    def measured(name: str, values: list[list[float]], weights: list[float]) -> Measure:
        found = drawn(values, weights, salt, are_answers=name == "answers")
        by_run = tuple(weighted_mean(one, weights) for one in values)
        is_first = salt == 0
        if is_first:
            first[name] = found
        of_seeds: dict[int, list[float]] = {}
        for seed, mean in zip(seeds, by_run, strict=True):
            of_seeds.setdefault(seed, []).append(mean)
        by_seed = tuple(map(fmean, of_seeds.values()))
        return Measure(found.interval(), by_run, by_seed, None if is_first else found.less(first[name]))

    seeds = tuple(run.seed for run in group)
    losses = [[row.tuned * (row.tokens if by_row else 1) for row in run.evaluation.row_losses] for run in group]
    weights = [1.0 if by_row else float(row.tokens) for row in group[0].evaluation.row_losses]
    pieces = [float(piece.tokens) for piece in group[0].forgetting.pieces]
    scores = [answer_scores(run.evaluation) for run in group]
    answers = [list(score.tuned) for score in scores if score is not None]
    return Configuration(
        name=_name_of(group),
        runs=tuple(run.run for run in group),
        seeds=seeds,
        adapter=group[0].adapter,
        parameters=group[0].parameters,
        seconds=fmean(run.seconds for run in group),
        peak_bytes=max(run.peak_bytes for run in group),
        devices=tuple(dict.fromkeys(run.device for run in group if run.device is not None)),
        loss=measured("loss", losses, weights),
        answers=measured("answers", answers, [1.0] * len(answers[0])) if answers else None,
        forgotten=measured(
            "forgotten", [[piece.tuned - piece.base for piece in run.forgetting.pieces] for run in group], pieces
        ),
        training_losses=tuple(run.training_loss for run in group),
    )


LOSS = {"token": "loss, nats", "row": "loss of a row, nats"}
LOSS_CHANGE, ANSWERS_CHANGE = "loss against the first", "against the first"
"""A difference has a sign of its own: "+0.2" below "less than the first" would be read as less."""


@dataclass(frozen=True)
class _Form:
    """How figures of one kind are written, as `qtune eval` writes them."""

    factor: float
    digits: str
    unit: str = ""

    def of(self, value: float) -> str:
        """Without a sign but a minus."""
        return f"{self.factor * value:{self.digits}}{self.unit}".replace("-", "−")

    def signed(self, value: float) -> str:
        """With its sign; a difference of shares is in points."""
        return f"{self.factor * value:+{self.digits}}".replace("-", "−")


NATS, SHARE, LIKENESS = _Form(1, ".3f"), _Form(100, ".1f", " %"), _Form(1, ".3f")


def cells(comparison: SideBySide) -> tuple[list[str], list[list[str]]]:
    """The table as texts: column names, and a row for the base and each configuration."""
    has_answers = comparison.answers_name is not None
    answers = LIKENESS if comparison.are_free else SHARE
    are_several = len(comparison.lines) > 1  # else there is no first one to differ from

    def with_change(value: str, change: str) -> list[str]:
        return [value, change] if are_several else [value]

    head = ["run", "adapter", "trained", "runs", *with_change(LOSS[comparison.loss_per], LOSS_CHANGE)]
    head += with_change(str(comparison.answers_name), ANSWERS_CHANGE) if has_answers else []
    head += ["forgotten, nats", "time", "peak memory"]
    rows = []
    for base in comparison.bases:
        name = "base" if len(comparison.bases) == 1 else f"base {base.name} ({base.quantization})"
        row = [name, "", "", "", *with_change(NATS.of(base.loss), "")]
        row += with_change(answers.of(base.answers or 0.0), "") if has_answers else []
        rows.append([*row, f"from {NATS.of(base.neutral_loss)}", "", ""])
    for line in comparison.lines:
        row = [line.name, line.adapter, f"{line.parameters / 1e6:.3f} M", str(len(line.runs))]
        row += with_change(_text(line.loss, NATS, NATS.of), _change(line.loss, NATS))
        if has_answers:
            row += with_change(_text(line.answers, answers, answers.of), _change(line.answers, answers))
        row += [_text(line.forgotten, NATS, NATS.signed), clock(line.seconds), gib_text(line.peak_bytes)]
        rows.append(row)
    return head, rows


def task_cells(comparison: SideBySide) -> tuple[list[str], list[list[str]]]:
    """The table of benchmarks as texts: column names, and a row for each task and metric."""
    base = "base" if len(comparison.bases) == 1 else "base of the first"
    head = ["task", "metric", base, *(line.name for line in comparison.lines)]
    rows = [[one.task, one.metric, number(one.base), *map(number, one.tuned)] for one in comparison.tasks]
    return head, rows


def _text(measure: Measure | None, form: _Form, written: Callable[[float], str]) -> str:
    """ "0.412 (0.390 to 0.437), SD 0.011"."""
    if measure is None:
        return ""
    text, deviation = _interval_text(measure.interval, written), measure.deviation
    return text if deviation is None else f"{text}, SD {form.of(deviation)}"


def _change(measure: Measure | None, form: _Form) -> str:
    """The difference to the first line; "~" before one whose interval has 0 in it."""
    if measure is None or measure.change is None:
        return ""
    text = _interval_text(measure.change, form.signed)
    return text if measure.change.is_clear else f"~ {text}"


def _interval_text(interval: Interval, written: Callable[[float], str]) -> str:
    mean = written(interval.mean)
    if interval.low is None or interval.high is None:
        return mean
    return f"{mean} ({written(interval.low)} to {written(interval.high)})"


def _training_losses(comparison: SideBySide) -> list[str]:
    """What each run's training loss was at its end, beside the loss on rows that were held out."""
    ended = [
        f"{Path(run).resolve().name} {number(loss)}"
        for line in comparison.lines
        for run, loss in zip(line.runs, line.training_losses, strict=True)
        if loss is not None
    ]
    return [f"training loss at the end, as each run says it: {', '.join(ended)}"] if ended else []


def _of_seen_rows(comparison: SideBySide) -> list[str]:
    """Which of the rows training saw, and what that means for the figures."""
    seen, said = comparison.rows_trained_on, []
    if comparison.left_out:
        more = "1 more row was" if comparison.left_out == 1 else f"{comparison.left_out} more rows were"
        by = ", ".join(f"{run} {count}" for run, count in seen.items())
        said.append(f"{more} asked and left out for all runs: training saw their prompts (of {by})")
    else:
        said += [
            f"{run}: training saw the prompts of {count} of the {comparison.rows} rows, on which its figures say "
            "nothing of new ones"
            for run, count in seen.items()
        ]
    return said + [
        f"{run}: whether training saw {'others' if run in seen else 'the rows'} is not known: {why}"
        for run, why in comparison.seen_unknown.items()
    ]


def explanation(comparison: SideBySide) -> list[str]:
    """What the figures of the table are, in sentences."""
    several = any(len(set(line.seeds)) > 1 for line in comparison.lines)
    drawn_again = "rows and runs" if several else "rows"
    said = [
        f"in brackets: 95 % intervals, by drawing {drawn_again} again; those of an evaluation, of one run, are "
        "computed without drawing and differ a little"
    ]
    if comparison.rows < FEWEST:
        said.append(f"loss and answers have none: an interval takes {FEWEST} rows, and these are {comparison.rows}")
    if len(comparison.lines) > 1:
        points = "" if comparison.answers_name is None or comparison.are_free else ", in points"
        more = "" if comparison.answers_name is None else f"; of answers{points}, + is better"
        said.append(f"against the first: of the loss, − is better{more}; ~: the interval has 0 in it")
    if comparison.loss_per == "row":
        said.append(
            "the runs make other tokens of the same rows (another tokenizer or template): the loss is summed over the "
            "scored tokens of a row, and what is forgotten is a mean over tokens of each run's own"
        )
    if comparison.answers_name is None:
        said.append(NO_ANSWERS)
    elif comparison.answers_cut:
        said.append(f"{comparison.answers_cut} expected answers are longer than --max-new-tokens and cannot match")
    if comparison.are_free:
        said.append("ROUGE-L: how like the expected answer it is, from 0 to 1, as in qtune eval")
    if several:
        said.append("SD: the standard deviation between seeds, of runs that differ in nothing else")
    for line in comparison.lines:
        for seed in sorted({seed for seed in line.seeds if line.seeds.count(seed) > 1}):
            same = [run for run, own in zip(line.runs, line.seeds, strict=True) if own == seed]
            said.append(
                f"{', '.join(same[:-1])} and {same[-1]} have one recipe and one seed: the same run over again, which "
                "says nothing about chance; for that, train it with: qtune run RECIPE --seeds 3"
            )
    said += _of_seen_rows(comparison)
    said += [f"{run} has ended early: it took {steps}" for run, steps in comparison.ended_early.items()]
    said += _training_losses(comparison)
    said.append(
        "forgotten: by how much the loss rose from the base's on a text that comes with qtune (tuned/neutral.txt) and "
        "is about none of the rows: + is worse than the base, − is better"
    )
    if len(comparison.bases) > 1:
        said.append(
            "the runs are not of one base: differences to the first one are the bases' as well as the training's"
        )
    if comparison.tasks_left_out is not None:
        said.append(comparison.tasks_left_out)
    if any(len(line.runs) > 1 for line in comparison.lines):
        said.append("time is the mean of a line's runs, memory the largest of their peaks")
    devices = {device for line in comparison.lines for device in line.devices}
    if len(devices) > 1:
        said.append(f"time and memory are of different devices: {', '.join(sorted(devices))}")
    return said
