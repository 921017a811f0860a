"""Base model against tuned model on held-out rows: loss, exact match, and their answers side by side.

Every row is asked as the model saw it in training: the prompt is what stands before the last scored answer, and the
answer that is expected is that answer.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune import console
from qtune.data.collate import PaddedCollator
from qtune.data.conversation import Conversation
from qtune.data.held_out import held_out_rows, spread
from qtune.data.masks import IGNORED
from qtune.device.present import one_sentence
from qtune.disk import refusal_of
from qtune.errors import DataError, Problem, RunError, WorkError, first_line
from qtune.model.loss import install_loss, loss_agrees
from qtune.recipe.schema import Recipe
from qtune.run.finished import whole_adapter
from qtune.run.folder import RunDir
from qtune.run.identity import write_of_run
from qtune.run.measured_adapter import adapter_name
from qtune.run.metrics import CUT
from qtune.run.resolved import as_written, resolved_recipe
from qtune.tuned.asked import AskedTurn, asked_turns, last_words
from qtune.tuned.base_once import BaseOnce
from qtune.tuned.evaluation import (
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
from qtune.tuned.generate import Ends, batches_of, find_ends, generate, positions_left, within_reach
from qtune.tuned.load import load_reader, load_untuned, with_adapter
from qtune.tuned.precision import training_autocast
from qtune.tuned.seen import seen_rows
from qtune.tuned.vocabulary import decoded, require_embeddings

TOKENS_PER_BATCH = 4096
SHORTER = "A smaller --max-new-tokens leaves more room; --data names other, shorter rows"


@dataclass(frozen=True)
class Question:
    """One held-out row: ids [prompt], the ids and text that are expected, and where it comes from."""

    place: str
    request: str
    prompt: tuple[int, ...]
    expected_ids: tuple[int, ...]
    expected: str
    turns: tuple[AskedTurn, ...] = ()
    """What the prompt says, as `Comparison.turns`."""


def evaluate(
    run_dir: RunDir,
    *,
    rows: int = 100,
    data_file: Path | None = None,
    max_new_tokens: int = 512,
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
    run = load_untuned(run_dir, accepted=accepted, parts=_parts(resolved_recipe(run_dir), data_file))
    written, folder = as_written(run_dir, run.recipe)
    source, held_out = _held_out(run_dir, written, run.tokenizer, folder, data_file)
    examples = held_out.select(spread(len(held_out), rows))
    for row in examples:
        require_embeddings(run.model, run.tokenizer, row["input_ids"], row["place"])
    predicted = _predicted(examples)
    if not sum(predicted):
        raise DataError(Problem(source, "none of the rows that were taken has an answer left to measure on"))
    is_share = data_file is None and written.data.test is None and isinstance(written.data.validation, float)
    seen = seen_rows(written, folder, run.tokenizer, examples, run_dir=run_dir, is_share=is_share)
    is_left_out = leaves_out(seen.flags, predicted)
    judged = [row for row, is_out in enumerate(is_left_out) if not is_out]
    others = [row for row, is_out in enumerate(is_left_out) if is_out]
    ends = find_ends(run.model, run.tokenizer)
    # The base is asked the same, so that the positions of a soft prompt are left free for it as well.
    reach = positions_left(run.model)
    reach = None if reach is None else reach - run.recipe.adapter.prompt_length
    all_questions = [to_question(row, run.tokenizer, ends) for row in examples]
    asked_of = [
        row
        for row, question in enumerate(all_questions)
        if question is not None and within_reach(1, len(question.prompt), reach) > 0
    ]
    questions = [question for row in asked_of if (question := all_questions[row]) is not None]
    in_scores = [not is_left_out[row] for row in asked_of]
    scored = sum(predicted[row] for row in judged)
    expected = [question.expected for question in questions]
    is_free = is_free_text(expected)
    times = FREE_TEXT_TIMES if is_free else 1
    limits = [
        within_reach(
            min(times * len(question.expected_ids) + EXTRA_TOKENS, max_new_tokens), len(question.prompt), reach
        )
        for question in questions
    ]
    first = torch.tensor([examples[0]["input_ids"]], device=run.model.device)
    install_loss(run.model, tiled=loss_agrees(run.model, first), tile_bytes=run.plan.loss_tile_bytes)

    def ask(model: PreTrainedModel | PeftModel, name: str) -> tuple[Score, list[float], list[tuple[str, bool]]]:
        which = "" if bases is None else f" of {run_dir.path}"
        work = f"{len(examples)} row{'' if len(examples) == 1 else 's'} to score"
        work += f", {len(questions)} to answer" if questions else ""
        rows = console.progress(f"{name} model{which}, {work}", len(examples) + len(questions))
        with one_sentence(SHORTER), rows as shown, training_autocast(run.plan):
            losses, right_tokens = [0.0] * len(examples), 0
            for numbers in filter(None, (others, judged)):  # apart, for what is right is only counted for a batch
                found, right_tokens = row_losses(model, examples.select(numbers), ends.pad, shown)
                for number, loss in zip(numbers, found, strict=True):
                    losses[number] = loss
            require_finite_losses(losses, examples["place"], name)
            prompts = [question.prompt for question in questions]
            made = generate(model, prompts, limits, ends, on_rows=shown.advance)
        answers = [answer_text(run.tokenizer, ids, limit) for ids, limit in zip(made, limits, strict=True)]
        cut = [_is_cut(ids, limit) for ids, limit in zip(made, limits, strict=True)]
        pairs = [pair for pair, counts in zip(zip(expected, answers, strict=True), in_scores, strict=True) if counts]
        exact_match = sum(one == other for one, other in pairs) / len(pairs) if pairs else None
        text = text_score(*map(list, zip(*pairs, strict=True))) if is_free and pairs else None
        loss = sum(losses[row] for row in judged) / scored
        return (
            Score(loss, right_tokens / scored, exact_match, text),
            losses,
            list(zip(answers, cut, strict=True)),
        )

    asked = [list(examples["input_ids"]), list(examples["labels"]), [q.prompt for q in questions], limits, ends.stop]
    asked.append(judged)
    base, base_losses, base_answers = (bases or BaseOnce()).measured(run, asked, lambda: ask(run.model, "base"))
    run = with_adapter(run)
    tuned, tuned_losses, tuned_answers = ask(run.model, "tuned")
    evaluation = Evaluation(
        run=str(run_dir.path),
        source=source,
        rows=len(examples),
        rows_held_out=len(held_out),
        scored_tokens=scored,
        answers_cut=sum(
            counts and len(question.expected_ids) > limit
            for question, limit, counts in zip(questions, limits, in_scores, strict=True)
        ),
        base=base,
        tuned=tuned,
        comparisons=tuple(
            Comparison(
                question.place,
                question.request,
                question.expected,
                before,
                after,
                is_before_cut,
                is_after_cut,
                seen.flags[row],
                question.turns,
            )
            for question, (before, is_before_cut), (after, is_after_cut), row in zip(
                questions, base_answers, tuned_answers, asked_of, strict=True
            )
        ),
        row_losses=tuple(
            RowLoss(place, tokens, before / tokens, after / tokens, content_of(conversation), is_seen)
            for place, tokens, before, after, conversation, is_seen in zip(
                examples["place"],
                predicted,
                base_losses,
                tuned_losses,
                examples["conversation"],
                seen.flags,
                strict=True,
            )
            if tokens
        ),
        adapter=adapter_name(run_dir),
        rows_trained_on=seen.count,
        left_out=sum(is_left_out),
        seen_unknown=seen.unknown,
    )
    kept = None
    with suppress(RunError):  # what is damaged is replaced
        kept = read_evaluation(run_dir)
    larger = kept if kept is not None and kept.rows > evaluation.rows else None
    if larger is not None and not replaces_larger:
        console.say(f"not kept: {run_dir.eval_file} has more rows, {larger.rows}")
        return evaluation
    try:
        run_dir.require_there()
        write_of_run(run_dir, run_dir.eval_file, evaluation)
        if larger is not None:
            console.say(f"{run_dir.eval_file} had {larger.rows} rows, and has {evaluation.rows} from now on")
    except OSError as error:  # what took minutes to ask is shown all the same
        console.say(f"not kept: {refusal_of(error) or first_line(error)}")
    return evaluation


def asked_rows(
    run_dir: RunDir, *, rows: int, data_file: Path | None = None, accepted: Sequence[str] = ()
) -> list[tuple[str, int]]:
    """What `evaluate` would ask with the same arguments, without any weight loaded: of each row that has a scored
    token, what it says (`content_of`) and how many of its tokens are scored.

    Raises:
        RunError, DataError: as `evaluate`.
    """
    parts = _parts(resolved_recipe(run_dir), data_file)
    recipe, _, tokenizer = load_reader(run_dir, accepted=accepted, parts=parts)
    written, folder = as_written(run_dir, recipe)
    _, held_out = _held_out(run_dir, written, tokenizer, folder, data_file)
    chosen = held_out.select(spread(len(held_out), rows)).select_columns(["conversation", "labels", "scored"])
    tokens = _predicted(chosen)
    return [(content_of(text), count) for text, count in zip(chosen["conversation"], tokens, strict=True) if count]


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


def require_finite_losses(losses: Sequence[float], places: Sequence[str], name: str) -> None:
    """Every row's loss is a number.

    Raises:
        WorkError: some are not; it says whether that is due to rows or to the model, which is "base" or "tuned".
    """
    broken = [place for place, loss in zip(places, losses, strict=True) if not math.isfinite(loss)]
    if not broken:
        return
    if len(broken) < len(losses):
        more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        raise WorkError(
            f"the {name} model's loss is no number on rows {', '.join(broken[:8])}{more}, and is one on the others; "
            "look at them, or compute in another type (quantization.compute_dtype)"
        )
    reason = "training has diverged, or its adapter is damaged" if name == "tuned" else "it computes no numbers at all"
    raise WorkError(f"the {name} model's loss is no number on any row: {reason}")


def to_question(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, ends: Ends) -> Question | None:
    """The row's last scored answer and what stands before it; None for raw text, which has no question, and for rows of
    which nothing is scored."""
    ids, labels = row["input_ids"], row["labels"]
    scored = [position for position, label in enumerate(labels) if label != IGNORED]
    if not scored:  # its answer was cut away
        return None
    end = scored[-1] + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    if start == 0:
        return None
    expected = [token for token in ids[start:end] if token not in ends.stop]
    conversation = Conversation.from_json(row["conversation"], row["place"])
    request = last_words(conversation.prompt)
    turns = asked_turns(conversation.prompt, conversation.tools)
    return Question(row["place"], request, tuple(ids[:start]), tuple(expected), _text(tokenizer, expected), turns)


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], limit: int) -> str:
    """An answer as compared and shown; an ellipsis says that it was stopped at its limit."""
    return _text(tokenizer, ids) + (CUT if _is_cut(ids, limit) else "")


def _is_cut(ids: Sequence[int], limit: int) -> bool:
    return len(ids) == limit


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return decoded(tokenizer, ids).strip()


@torch.no_grad()
def row_losses(
    model: PreTrainedModel | PeftModel, examples: Dataset, pad: int, shown: console.Bar
) -> tuple[list[float], int]:
    """The summed negative log-likelihood of each row's scored tokens but its first token, in nats, and how many of all
    were the likeliest.

    model: with `install_loss`.
    """
    collate = PaddedCollator(pad)
    losses, correct = [0.0] * len(examples), 0
    for rows in batches_of([(length, 0) for length in examples["length"]], TOKENS_PER_BATCH):
        batch = collate(
            [
                {"input_ids": one["input_ids"], "labels": [IGNORED, *one["labels"][1:]]}
                for one in (examples[row] for row in rows)
            ]
        )
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False)
        for row, loss in zip(rows, output.row_losses.tolist(), strict=True):
            losses[row] = loss
        correct += int(output.correct)
        shown.advance(len(rows))
    return losses, correct
