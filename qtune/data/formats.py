"""The shapes that rows come in -> conversations. A shape is named in the recipe or recognized by its columns."""

import difflib
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qtune.data.account import Account, holds_something
from qtune.data.conversation import (
    ROLES,
    Conversation,
    Message,
    RowError,
    conversation,
    document,
    require_text,
    said,
    shown,
    text_of,
)
from qtune.data.order import ordered, with_system
from qtune.data.suspect import is_word_for_nothing
from qtune.data.tool_calls import TOOLS, read_tools, without_padding
from qtune.data.turn_keys import REASONING, is_like_a_switch, reasoning_of
from qtune.data.turns import ROLE_NAMES, Turn, listed, read_turns
from qtune.recipe.text import show_value

RawRow = Mapping[str, Any]

COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}
# Columns beside them that a shape reads. A system message and tools belong to any conversation; reasoning and earlier
# turns to shapes that have no turns of their own.
SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = "history"
BESIDE = {
    "messages": (*SYSTEM, *TOOLS),
    "sharegpt": (*SYSTEM, *TOOLS),
    "prompt-completion": (*SYSTEM, *TOOLS, *REASONING, HISTORY),
    "alpaca": (*SYSTEM, *TOOLS, *REASONING, HISTORY, "input"),
    "question-answer": (*SYSTEM, *TOOLS, *REASONING, HISTORY),
    "text": (),
}
# Columns that belong to a question, which the row would have to hold in it.
INPUTS = ("context", "choices", "options", "passage")
# Columns whose meaning is known and would change what is learned, in a way that a row cannot ask for here.
REFUSED = {
    "images": "only text can be trained on",
    "videos": "only text can be trained on",
    "audios": "only text can be trained on",
    "image": "only text can be trained on",
    "video": "only text can be trained on",
    "audio": "only text can be trained on",
    "chat_template_kwargs": "a row cannot choose how the template renders it; give a chat_template that does",
}
ROW_WEIGHTS = ("weight", "sample_weight", "loss_weight", "loss_scale")


def renamed(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    """The row with the columns that the recipe renames: `columns` maps our name to the file's."""
    if not columns:
        return row
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def with_the_files_names(message: str, columns: Mapping[str, str]) -> str:
    """What is wrong with a row whose columns were renamed, for somebody who looks at the file."""
    named = [f"{ours} is {theirs!r} there" for ours, theirs in columns.items() if re.search(rf"\b{ours}\b", message)]
    return f"{message} ({', '.join(named)})" if named else message


def replaced(row: RawRow, columns: Mapping[str, str]) -> list[str]:
    """Columns of the row whose names the recipe gives to others, so that they are not read."""
    return [key for key in row if key in columns and key not in columns.values() and holds_something(row[key])]


def unknown_name(name: str) -> str | None:
    """What is wrong with a name on the left of `columns`; None for one that some shape reads."""
    known = sorted({key for keys in (*COLUMNS.values(), *BESIDE.values()) for key in keys})
    if name in known:
        return None
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"no shape of rows has such a column; {advice}"


def detect_format(row: RawRow) -> str | None:
    """The first known shape whose columns the row has.

    "conversations" with role/content inside is messages under another name; the ShareGPT reader takes both.
    """
    return next((name for name, needed in COLUMNS.items() if all(key in row for key in needed)), None)


SHAPES_IN_WORDS = (
    "question and answer, prompt and completion, instruction and output, messages, conversations, or text alone"
)


def unknown_columns(row: RawRow) -> str:
    """What to say about a row of no known shape: the line that would make it one where its columns let that be told,
    else what shapes there are."""
    said = f"columns {', '.join(map(str, row)) or '(none)'} fit no known shape; "
    inner = [key for key, value in row.items() if isinstance(value, list) and _are_rows(value)]
    if "chosen" in row and "rejected" in row:
        return said + (
            "pairs of a chosen and a rejected answer are for preference training, which qtune does not do; "
            'columns = { completion = "chosen" } learns the chosen ones'
        )
    if inner:
        return f"{said}its {inner[0]!r} holds rows: write that list alone into the file"
    if "chosen" not in row and (advice := _advice(row)):
        return said + advice
    if not any(isinstance(value, (str, list)) for value in row.values()):
        return f"{said}none of them holds text to learn from"
    return f"{said}a row has {SHAPES_IN_WORDS}: rename them with columns"


# What data sets call our columns.
_OTHER_NAMES = {
    "messages": ("dialogue", "dialog", "chat", "conversation", "turns"),
    "prompt": ("query", "input", "question", "user", "source", "instruction"),
    "completion": ("response", "answer", "output", "reply", "assistant", "target", "chosen"),
    "instruction": ("question", "prompt", "query"),
    "input": ("context", "passage"),
    "output": ("response", "answer", "completion", "reply", "target"),
}


def meant_columns(row: RawRow) -> dict[str, str]:
    """The columns to rename so that a row has a known shape, our names to the file's, as far as its columns let that be
    guessed; empty where it has a shape or is near none."""
    if detect_format(row) is not None or "chosen" in row:
        return {}
    if names := _mapping(row):
        return names
    if (half := _half_of_a_shape(row)) is not None:
        there, missing = half
        return {missing: rest[0]} if (rest := [key for key in _texts(row) if key != there]) else {}
    return _question_and_answer(row)


def _advice(row: RawRow) -> str:
    """What would make a known shape of a row; "" where nothing in it is near one."""
    if names := _mapping(row):
        return f"write {_lines(names)}"
    if (half := _half_of_a_shape(row)) is not None:
        there, missing = half
        said = f"{there!r} is there and {missing!r} is missing"
        meant = meant_columns(row)
        return said + (f"; if {meant[missing]!r} is meant by it, write {_lines(meant)}" if meant else "")
    if not (names := _question_and_answer(row)):
        return ""
    return f"if {names['question']!r} is the question and {names['answer']!r} the answer, write {_lines(names)}"


def _half_of_a_shape(row: RawRow) -> tuple[str, str] | None:
    """Of a question and an answer by our names the one that is there, and the one that is missing."""
    for question, answer in (COLUMNS[name] for name in ("question-answer", "prompt-completion", "alpaca")):
        if (question in row) != (answer in row):
            return (question, answer) if question in row else (answer, question)
    return None


def _question_and_answer(row: RawRow) -> dict[str, str]:
    """A guess which columns are question and answer; empty where there are no two that could be."""
    texts = _texts(row)
    present = _by_plain_name(texts)
    answer_column = _called("completion", present)
    question_column = next((key for key in texts if key == _called("prompt", present)), None)
    question_column = question_column or next((key for key in texts if key != answer_column), None)
    answer_column = answer_column or next((key for key in reversed(texts) if key != question_column), None)
    if question_column is None or answer_column is None:
        return {}
    return {"question": question_column, "answer": answer_column}


def _texts(row: RawRow) -> list[str]:
    """The columns of a row that may be its question or its answer; those of several words before all others, which are
    numbers and names of the row more often."""
    beside = (*SYSTEM, *TOOLS, *REASONING, HISTORY)
    texts = {str(key): value for key, value in row.items() if isinstance(value, str) and value.strip()}
    free = [key for key in texts if key not in beside]
    spoken = [key for key in free if len(texts[key].split()) > 1]
    return spoken if len(spoken) > 1 else free


def _by_plain_name(columns: Iterable[Any]) -> dict[str, str]:
    """Columns by their names in small letters without white space."""
    return {str(key).strip().lower().replace(" ", "_"): str(key) for key in columns}


def _lines(names: Mapping[str, str]) -> str:
    """How a recipe, and a command, rename columns: our name to the file's."""
    table = show_value(dict(names))
    return f"[data] columns = {table} in the recipe, or add --set {shlex.quote(f'data.columns={table}')}"


def _mapping(row: RawRow) -> dict[str, str]:
    """The columns to rename for a known shape, our names to the file's; none where no shape is near."""
    present = _by_plain_name(row)
    shapes = [COLUMNS["messages"], *(COLUMNS[name] for name in _ONE_QUESTION)]
    if any(key in present for key in ("context", "passage")):
        shapes = [("instruction", "input", "output"), *shapes]
    found = [{ours: _called(ours, present) for ours in needed} for needed in shapes]
    whole = [
        {ours: theirs for ours, theirs in names.items() if theirs is not None}
        for names in found
        if all(names.values()) and len(set(names.values())) == len(names)
    ]
    # The more of a shape's own names a row has, the likelier it is meant; shapes with more columns lose less.
    best = max(whole, key=lambda names: (sum(ours in present for ours in names), len(names)), default={})
    return {ours: theirs for ours, theirs in best.items() if ours != theirs}


def _called(ours: str, present: Mapping[str, str]) -> str | None:
    """The column of a row that is meant by one of ours."""
    return next((present[name] for name in (ours, *_OTHER_NAMES.get(ours, ())) if name in present), None)


def _are_rows(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], dict) and detect_format(values[0]) is not None


def to_conversation(
    row: RawRow,
    row_format: str,
    place: str,
    system: str = "keep",
    system_prompt: str | None = None,
    turn_order: str = "error",
) -> Conversation:
    """The conversation of a row under the system policy and the policy about the order of turns.

    Raises:
        RowError: the row does not have the shape, or its conversation cannot be learned from.
        OutOfOrder: its turns stand in an order that cannot be learned from.
    """
    try:
        return _conversation_of(row, row_format, place, system, system_prompt, turn_order)
    except RecursionError as error:  # JSON's reader goes deeper than those who walk through what it has read
        raise RowError("nested too deeply") from error


def _conversation_of(
    row: RawRow, row_format: str, place: str, system: str, system_prompt: str | None, turn_order: str
) -> Conversation:
    for key in COLUMNS[row_format]:
        if key not in row:
            raise RowError(f"no {key!r} in a {row_format} row; found {', '.join(map(str, row)) or 'nothing'}")
    account = Account()
    _refuse_columns(row, row_format)
    used = (*COLUMNS[row_format], *BESIDE[row_format])
    account.rest({key: value for key, value in row.items() if not _means_once(key, value)}, used)
    if row_format == "text":
        return document(row["text"], place, account.unused)
    if row_format in _ONE_QUESTION and any(holds_something(row.get(key)) for key in INPUTS):
        account.notes.add("unused-input")
    turns = [turn for turn in _READERS[row_format](row, account) if not _is_blank_system(turn.message)]
    if not turns:
        raise RowError(f"{COLUMNS[row_format][0]} is empty; expected at least a user and an assistant turn")
    turns = _with_system_column(row, turns)
    for turn in turns:
        if system != "drop" or turn.message["role"] != "system":
            require_text(turn.message, turn.where)
    messages = with_system([turn.message for turn in ordered(turns, turn_order, account)], system, system_prompt)
    tools = _tools(row, account)
    messages = [
        {**message, "tool_calls": without_padding(message["tool_calls"], tools, account)}
        if "tool_calls" in message
        else message
        for message in messages
    ]
    return conversation(messages, tools, place, account.unused, account.notes)


# Shapes whose rows are a question and an answer in columns of their own.
_ONE_QUESTION = ("prompt-completion", "alpaca", "question-answer")


def _means_once(column: str, value: object) -> bool:
    """Whether a column says of its row that it counts once, which is what happens. CSV has numbers as texts."""
    if column not in ROW_WEIGHTS or not isinstance(value, (int, float, str)):
        return False
    try:
        return float(value) == 1
    except (ValueError, OverflowError):
        return False


def _refuse_columns(row: RawRow, row_format: str) -> None:
    """Raises a RowError for a column that would change what is learned, if it were read."""
    for column, value in row.items():
        if not holds_something(value) or _means_once(column, value):
            continue
        if column in REFUSED:
            raise RowError(f"{column} = {shown(value)}: {REFUSED[column]}; remove the column, or leave such rows out")
        if column in ROW_WEIGHTS and is_like_a_switch(column, value):
            raise RowError(
                f"{column} = {shown(value)}: a row has no weight of its own; give sources weights "
                "([data] train = [{ path, weight }]), or remove the column"
            )
        if column not in (*COLUMNS[row_format], *BESIDE[row_format]) and is_like_a_switch(column, value):
            raise RowError(
                f"{column} = {shown(value)}: looks like a mask or switch of the loss, which a row cannot have here; "
                "give a message weight = 0 or 1, or remove the column"
            )
        if column == "label" and row_format == "prompt-completion" and str(value).lower() == "false":
            raise RowError(
                "label = false: an answer that is marked as undesired (KTO); learning it would teach it. Leave such "
                'rows out, with on_bad_row = "skip" for example'
            )


def _is_blank_system(message: Message) -> bool:
    """Whether this is the system message that programs write where there is none."""
    return message["role"] == "system" and not message["content"].strip()


def _with_system_column(row: RawRow, turns: list[Turn]) -> list[Turn]:
    """The turns behind the system message that stands in a column of its own.

    Raises:
        RowError: the turns have another system message already.
    """
    texts = {key: text_of(row[key], key) for key in SYSTEM if holds_something(row.get(key))}
    told = {key: text for key, text in texts.items() if text.strip()}
    if not told:
        return turns
    key, text = next(iter(told.items()))
    others = [(turn.where, turn.message["content"]) for turn in turns if turn.message["role"] == "system"]
    for where, other in [*list(told.items())[1:], *others]:
        if other != text:
            raise RowError(f"{key} and {where} are different system messages; keep one")
    return turns if others else [Turn(key, {"role": "system", "content": text}), *turns]


def _tools(row: RawRow, account: Account) -> list[dict[str, Any]]:
    """Tool definitions; functions are OpenAI's older form of them."""
    given = [key for key in TOOLS if holds_something(row.get(key))]
    if len(given) > 1:
        raise RowError(f"both {' and '.join(given)}; keep one")
    return read_tools(row[given[0]], given[0], account) if given else []


def _from_messages(row: RawRow, account: Account) -> list[Turn]:
    return read_turns(row["messages"], "messages", account, role_key="role", content_key="content")


def _from_sharegpt(row: RawRow, account: Account) -> list[Turn]:
    turns = listed(row["conversations"], "conversations")
    is_sharegpt = bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    return read_turns(turns, "conversations", account, role_key=role_key, content_key=content_key)


def _from_prompt_completion(row: RawRow, account: Account) -> list[Turn]:
    turns = _history(row)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[key], list) or _is_list_of_turns(row[key]):
            turns += read_turns(row[key], key, account, role_key="role", content_key="content")
        else:
            turns.append(Turn(key, {"role": role, "content": said(row[key], key)}))
    return _with_reasoning(row, turns, account)


# A list of turns as JSON text, which tables without nesting hold, or as Python writes it.
_TURNS_OPEN = re.compile(r"\s*\[\s*\{")
_SPEAKER = re.compile(r"""["']role["']\s*:\s*["'](\w+)["']""")
_SPOKEN = re.compile(r"""["']content["']\s*:""")


def _is_list_of_turns(value: object) -> bool:
    """Whether a text is a list of turns, and no answer that is a list of other things."""
    if not isinstance(value, str) or not _TURNS_OPEN.match(value):
        return False
    speaker = _SPEAKER.search(value)
    return speaker is not None and speaker[1].lower() in (*ROLES, *ROLE_NAMES) and bool(_SPOKEN.search(value))


def _from_alpaca(row: RawRow, account: Account) -> list[Turn]:
    instruction, given = said(row["instruction"], "instruction"), row.get("input")
    if given is not None and is_word_for_nothing(text_of(given, "input")):
        account.notes.add("word-for-nothing")
    if given is not None and text_of(given, "input").strip():
        instruction = f"{instruction}\n\n{given}"
    return _one_turn(row, ("instruction", instruction), ("output", said(row["output"], "output")), account)


def _from_question_answer(row: RawRow, account: Account) -> list[Turn]:
    asked, answered = said(row["question"], "question"), said(row["answer"], "answer")
    return _one_turn(row, ("question", asked), ("answer", answered), account)


def _one_turn(row: RawRow, asked: tuple[str, str], answered: tuple[str, str], account: Account) -> list[Turn]:
    question = Turn(asked[0], {"role": "user", "content": asked[1]})
    answer = Turn(answered[0], {"role": "assistant", "content": answered[1]})
    return _with_reasoning(row, [*_history(row), question, answer], account)


def _history(row: RawRow) -> list[Turn]:
    """Earlier turns: pairs of a question and its answer, as LLaMA-Factory and ms-swift write them.

    Raises:
        RowError: they are something else.
    """
    turns: list[Turn] = []
    for index, pair in enumerate(listed(row[HISTORY], HISTORY) if holds_something(row.get(HISTORY)) else ()):
        where = f"{HISTORY}[{index}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"{where} = {shown(pair)}: not a pair of a question and its answer")
        for number, role in enumerate(("user", "assistant")):
            place = f"{where}[{number}]"
            turns.append(Turn(place, {"role": role, "content": said(pair[number], place)}))
    return turns


def _with_reasoning(row: RawRow, turns: list[Turn], account: Account) -> list[Turn]:
    """What was thought before the answer, from a column of its own."""
    thought = reasoning_of(row, "", account)
    if thought is None:
        return turns
    answer = turns[-1]
    if answer.message.get("reasoning_content") not in (None, thought):
        raise RowError(f"{answer.where} and a column beside it hold different reasoning; keep one")
    return [*turns[:-1], Turn(answer.where, {**answer.message, "reasoning_content": thought})]


_READERS: Mapping[str, Callable[[RawRow, Account], list[Turn]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt-completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "question-answer": _from_question_answer,
}
