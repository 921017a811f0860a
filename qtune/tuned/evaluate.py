"""Base model against tuned model on held-out rows: loss, exact match, and their answers side by side.

Every row is asked as the model saw it in training: the prompt is what stands before the last scored answer, and the
answer that is expected is that answer.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qtune import console
from qtune.data.conversation import Conversation
from qtune.data.held_out import held_out_rows, spread
from qtune.data.masks import IGNORED
from qtune.device.present import one_sentence
from qtune.disk import refusal_of
from qtune.errors import DataError, Problem, RunError, first_line
from qtune.model.loss import install_loss, loss_agrees
from qtune.recipe.schema import Recipe
from qtune.run.drift import accepting_once
from qtune.run.finished import whole_adapter
from qtune.run.folder import RunDir
from qtune.run.identity import write_of_run
from qtune.run.measured_adapter import adapter_name
from qtune.run.resolved import as_written, resolved_recipe
from qtune.tuned.base_once import BaseOnce
from qtune.tuned.evaluation import (
    ANSWER_TOKENS,
    EXTRA_TOKENS,
    FREE_TEXT_TIMES,
    Comparison,
    Evaluation,
    RowLoss,
    Score,
    leaves_out,
    read_evaluation,
)
from qtune.tuned.free_text import is_free_text, text_score
from qtune.tuned.generate import Ends, answers_to, find_ends, positions_left, within_reach
from qtune.tuned.load import LoadedRun, load_reader, load_untuned, with_adapter
from qtune.tuned.precision import training_autocast
from qtune.tuned.questions import Question, answer_text, to_question
from qtune.tuned.row_losses import require_finite_losses, row_losses
from qtune.tuned.seen import SeenRows, seen_rows
from qtune.tuned.vocabulary import require_embeddings

SHORTER = "A smaller --max-new-tokens leaves more room; --data names other, shorter rows"


@accepting_once()
def evaluate(
    run_dir: RunDir,
    *,
    rows: int = 100,
    data_file: Path | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
    accepted: Sequence[str] = (),
    replaces_larger: bool = True,
    bases: BaseOnce | None = None,
) -> Evaluation:
    """Asks both models `rows` held-out rows, spread evenly over all of them, and writes eval.json into the run.

    accepted: kinds of drift (`run.drift`) that it goes on with. replaces_larger: whether it is also written where an
    evaluation of more rows is kept. bases: what other runs' bases were found to say, where several are asked.

    The base model is asked before the adapter is attached, so that nothing of it can be left on.

    Raises:
        RunError: the run has not ended, or is not what was trained.
        DataError: there are no held-out rows, or they cannot be used.
    """
    whole_adapter(run_dir)
    if bases is None:  # who asks several runs has looked at the rows of all of them
        asked_rows(run_dir, rows=rows, data_file=data_file, accepted=accepted)
    run = load_untuned(run_dir, accepted=accepted, parts=_parts(resolved_recipe(run_dir), data_file))
    asked = _asked(run_dir, run, rows, data_file, max_new_tokens)
    first = torch.tensor([asked.examples[0]["input_ids"]], device=run.model.device)
    install_loss(run.model, tiled=loss_agrees(run.model, first), tile_bytes=run.plan.loss_tile_bytes)
    whose = "" if bases is None else f" of {run_dir.path}"
    base = (bases or BaseOnce()).measured(run, asked.decisive, lambda: _answers(run, asked, "base", whose))
    tuned = _answers(with_adapter(run), asked, "tuned", whose)
    evaluation = _evaluation(run_dir, asked, base, tuned)
    _keep(run_dir, evaluation, replaces_larger=replaces_larger)
    return evaluation


@dataclass(frozen=True)
class _Asked:
    """What both models are asked."""

    source: str
    """Where the rows come from."""
    rows_held_out: int
    """That there are, of which `examples` were taken."""
    examples: Dataset
    predicted: list[int]
    """Of each row, how many tokens are scored."""
    seen: SeenRows
    is_left_out: list[bool]
    """Of each row, whether it counts in no score."""
    questions: list[Question]
    row_of: list[int]
    """Of each question."""
    limits: list[int]
    """Of each question, the most tokens of an answer."""
    rooms: list[int]
    """Of each question, the most tokens that are made: the one behind an answer of its limit tells whether it ended."""
    max_new_tokens: int
    """The most of any."""
    is_limited: bool
    """Whether that is less than one of them would be."""
    is_free: bool
    """Whether the answers are free text."""
    ends: Ends

    @property
    def judged(self) -> list[int]:
        """The rows that count."""
        return [row for row, is_out in enumerate(self.is_left_out) if not is_out]

    @property
    def others(self) -> list[int]:
        """The rows that do not."""
        return [row for row, is_out in enumerate(self.is_left_out) if is_out]

    @property
    def are_judged(self) -> list[bool]:
        """Of each question, whether its row counts."""
        return [not self.is_left_out[row] for row in self.row_of]

    @property
    def scored_tokens(self) -> int:
        """Of the rows that count."""
        return sum(self.predicted[row] for row in self.judged)

    @property
    def decisive(self) -> list[Any]:
        """All that decides what a model answers, as JSON can write it."""
        prompts = [question.prompt for question in self.questions]
        ids, labels = list(self.examples["input_ids"]), list(self.examples["labels"])
        return [ids, labels, prompts, self.limits, self.ends.stop, self.judged]


@dataclass(frozen=True)
class _Answers:
    """What one of the two models says to what both are asked."""

    score: Score
    losses: list[float]
    """Of each row, summed over its scored tokens."""
    texts: list[str]
    """Of each question."""
    are_cut: list[bool]
    """Of each question, whether its limit stopped the answer."""


def _asked(run_dir: RunDir, run: LoadedRun, rows: int, data_file: Path | None, max_new_tokens: int) -> _Asked:
    """Which rows and questions a run's models are asked; the arguments and errors are those of `evaluate`."""
    written, folder = as_written(run_dir, run.recipe)
    source, held_out = _held_out(run_dir, written, run.tokenizer, folder, data_file)
    examples = held_out.select(spread(len(held_out), rows))
    for row in examples:
        require_embeddings(run.model, run.tokenizer, row["input_ids"], row["place"])
    predicted = _predicted(examples)
    is_share = data_file is None and written.data.test is None and isinstance(written.data.validation, float)
    seen = seen_rows(written, folder, run.tokenizer, examples, run_dir=run_dir, is_share=is_share)
    ends = find_ends(run.model, run.tokenizer)
    # The base is asked the same, so that the positions of a soft prompt are left free for it as well.
    reach = positions_left(run.model)
    reach = None if reach is None else reach - run.recipe.adapter.prompt_length
    asked = [
        (row, question)
        for row, example in enumerate(examples)
        if (question := to_question(example, run.tokenizer, ends)) is not None
        and within_reach(1, len(question.prompt), reach) > 0
    ]
    questions = [question for _, question in asked]
    is_free = is_free_text([question.expected for question in questions])
    times = FREE_TEXT_TIMES if is_free else 1
    wanted = [times * len(question.expected_ids) + EXTRA_TOKENS for question in questions]
    return _Asked(
        source=source,
        rows_held_out=len(held_out),
        examples=examples,
        predicted=predicted,
        seen=seen,
        is_left_out=leaves_out(seen.flags, predicted),
        questions=questions,
        row_of=[row for row, _ in asked],
        limits=[
            within_reach(min(tokens, max_new_tokens), len(question.prompt), reach)
            for tokens, question in zip(wanted, questions, strict=True)
        ],
        rooms=[
            within_reach(min(tokens, max_new_tokens) + 1, len(question.prompt), reach)
            for tokens, question in zip(wanted, questions, strict=True)
        ],
        max_new_tokens=max_new_tokens,
        is_limited=max(wanted, default=0) > max_new_tokens,
        is_free=is_free,
        ends=ends,
    )


def _answers(run: LoadedRun, asked: _Asked, name: str, whose: str) -> _Answers:
    """Asks a run's model as it is now, which is called `name`: "base" or "tuned"."""
    count, questions = len(asked.examples), asked.questions
    work = f"{count} row{'' if count == 1 else 's'} to score"
    work += f", {len(questions)} to answer" if questions else ""
    progress = console.progress(f"{name} model{whose}, {work}", count + len(questions))
    with one_sentence(SHORTER), progress as shown, training_autocast(run.plan):
        losses, right_tokens = [0.0] * count, 0
        # Apart, for what is right is only counted for a batch.
        for numbers in filter(None, (asked.others, asked.judged)):
            found, right_tokens = row_losses(run.model, asked.examples.select(numbers), asked.ends.pad, shown)
            for number, loss in zip(numbers, found, strict=True):
                losses[number] = loss
        require_finite_losses(losses, asked.examples["place"], name)
        prompts = [question.prompt for question in questions]
        made = answers_to(run.model, prompts, asked.rooms, asked.ends, on_rows=shown.advance)
    answered = list(zip(made, asked.limits, strict=True))
    are_whole = [one.is_whole and len(one.ids) <= limit for one, limit in answered]
    texts = [
        answer_text(run.tokenizer, one.ids[:limit], is_whole=is_whole)
        for (one, limit), is_whole in zip(answered, are_whole, strict=True)
    ]
    pairs = [
        (question.expected, text)
        for question, text, counts in zip(questions, texts, asked.are_judged, strict=True)
        if counts
    ]
    score = Score(
        sum(losses[row] for row in asked.judged) / asked.scored_tokens,
        right_tokens / asked.scored_tokens,
        sum(expected == text for expected, text in pairs) / len(pairs) if pairs else None,
        text_score(*map(list, zip(*pairs, strict=True))) if asked.is_free and pairs else None,
    )
    return _Answers(score, losses, texts, [not is_whole for is_whole in are_whole])


def _evaluation(run_dir: RunDir, asked: _Asked, base: _Answers, tuned: _Answers) -> Evaluation:
    """Both beside each other."""
    examples, flags = asked.examples, asked.seen.flags
    return Evaluation(
        run=str(run_dir.path),
        source=asked.source,
        rows=len(examples),
        rows_held_out=asked.rows_held_out,
        scored_tokens=asked.scored_tokens,
        answers_cut=sum(
            counts and len(question.expected_ids) > limit
            for question, limit, counts in zip(asked.questions, asked.limits, asked.are_judged, strict=True)
        ),
        base=base.score,
        tuned=tuned.score,
        comparisons=tuple(
            Comparison(
                question.place,
                question.request,
                question.expected,
                base.texts[number],
                tuned.texts[number],
                base.are_cut[number],
                tuned.are_cut[number],
                flags[asked.row_of[number]],
                question.turns,
            )
            for number, question in enumerate(asked.questions)
        ),
        row_losses=tuple(
            RowLoss(place, tokens, before / tokens, after / tokens, content_of(conversation), is_seen)
            for place, tokens, before, after, conversation, is_seen in zip(
                examples["place"],
                asked.predicted,
                base.losses,
                tuned.losses,
                examples["conversation"],
                flags,
                strict=True,
            )
            if tokens
        ),
        adapter=adapter_name(run_dir),
        rows_trained_on=asked.seen.count,
        left_out=sum(asked.is_left_out),
        seen_unknown=asked.seen.unknown,
        max_new_tokens=asked.max_new_tokens,
        is_limited=asked.is_limited,
    )


def _keep(run_dir: RunDir, evaluation: Evaluation, *, replaces_larger: bool) -> None:
    """Writes eval.json, unless one of more rows is there and is to stay."""
    kept = None
    with suppress(RunError):  # what is damaged is replaced
        kept = read_evaluation(run_dir)
    larger = kept if kept is not None and kept.rows > evaluation.rows else None
    if larger is not None and not replaces_larger:
        console.say(f"not kept: {run_dir.eval_file} has more rows, {larger.rows}")
        return
    try:
        run_dir.require_there()
        write_of_run(run_dir, run_dir.eval_file, evaluation)
        if larger is not None:
            console.say(f"{run_dir.eval_file} had {larger.rows} rows, and has {evaluation.rows} from now on")
    except OSError as error:  # what took minutes to ask is shown all the same
        console.say(f"not kept: {refusal_of(error) or first_line(error)}")


def asked_rows(run_dir: RunDir, *, rows: int, data_file: Path | None = None, accepted: Sequence[str] = ()) -> list[str]:
    """What `evaluate` would ask with the same arguments, without any weight loaded: of each row that has a scored
    token, what it says (`content_of`).

    Raises:
        RunError: as `evaluate`. DataError: there are no held-out rows, or nothing of them can be used or is scored.
    """
    parts = _parts(resolved_recipe(run_dir), data_file)
    recipe, _, tokenizer = load_reader(run_dir, accepted=accepted, parts=parts)
    written, folder = as_written(run_dir, recipe)
    source, held_out = _held_out(run_dir, written, tokenizer, folder, data_file)
    chosen = held_out.select(spread(len(held_out), rows)).select_columns(["conversation", "labels", "scored"])
    tokens = _predicted(chosen)
    if not sum(tokens):
        raise DataError(Problem(source, "none of the rows that were taken has an answer left to measure on"))
    return [content_of(text) for text, count in zip(chosen["conversation"], tokens, strict=True) if count]


def _held_out(
    run_dir: RunDir, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, data_file: Path | None
) -> tuple[str, Dataset]:
    """The rows to ask; of a run whose files of rows are gone or others by now, the way to ask others is said."""
    try:
        return held_out_rows(recipe, tokenizer, folder, data_file)
    except DataError as error:
        if data_file is not None or all(problem.place == "data.validation" for problem in error.problems):
            raise
        way = "its held-out rows are read from there; put them back, or name others with --data FILE"
        raise DataError([*error.problems, Problem(str(run_dir.path), way)]) from error


def _predicted(examples: Dataset) -> list[int]:
    """How many scored tokens of each row a model predicts: the first of raw text has nothing before it.

    A soft prompt predicts that one too, and trains on it; the base cannot, and only the same tokens can be compared.
    """
    return [
        scored - (labels[:1] != [IGNORED] and scored > 0)
        for scored, labels in zip(examples["scored"], examples["labels"], strict=True)
    ]


def content_of(conversation: str) -> str:
    """A name for what a row says, wherever it stands: the start of the SHA-256 of its turns and tools.

    A system message may be the recipe's, of which the rows are no others.
    """
    value = Conversation.from_json(conversation)
    turns = [message for message in value.messages if message["role"] != "system"]
    text = json.dumps([turns, value.tools], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


def _parts(recipe: Recipe, data_file: Path | None) -> tuple[str, ...]:
    """The keys of [data] whose files the rows come from; a share is one of the training rows."""
    if data_file is not None:
        return ()
    if recipe.data.test is not None:
        return ("test",)
    return ("train",) if isinstance(recipe.data.validation, float) else ("validation",)
