"""The order of turns: what a template can render and a model can learn from, and what a recipe wants done otherwise."""

from collections.abc import Mapping, Sequence

from qtune.data.account import Account
from qtune.data.conversation import Message, RowError
from qtune.data.turns import Turn

# Which roles may stand after a role. System messages stand anywhere and are looked through.
_NEXT: Mapping[str, tuple[str, ...]] = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class OutOfOrder(RowError):  # noqa: N818  it says how the turns stand
    """Turns that stand in an order that cannot be learned from as it is."""


def ordered(turns: Sequence[Turn], policy: str, account: Account) -> list[Turn]:
    """The turns in an order that can be learned from.

    "merge" puts turns of the same role that follow each other into one, keeps an answer that opens the conversation as
    context that is not scored, and leaves out what nobody answers at the end; it notes what it did. The other policies
    change nothing.

    Raises:
        OutOfOrder: the order cannot be learned from, with the place in the row.
    """
    if policy == "merge":
        turns = _merged(turns, account)
    previous, last = "", None
    may_open = policy == "merge" and sum(turn.message["role"] != "system" for turn in turns) > 1
    for number, turn in enumerate(turns):
        role = turn.message["role"]
        if role == "system":
            continue
        opens = may_open and role == "assistant" and not previous
        if role not in _NEXT[previous] and not opens:
            after = f"after {previous}" if previous else "first"
            allowed = " or ".join(("system", *_NEXT[previous]) if number == 0 else _NEXT[previous])
            raise OutOfOrder(f"turns out of order: {turn.where} is {role} {after}; expected {allowed}")
        previous, last = role, turn
    if last is None or turns[-1].message["role"] != "assistant":
        place, role = turns[-1].where, turns[-1].message["role"]
        raise OutOfOrder(f"the last turn ({place}) is {role}'s; expected an assistant turn to learn")
    return list(turns)


def _merged(turns: Sequence[Turn], account: Account) -> list[Turn]:
    kept = list(turns)
    while kept and kept[-1].message["role"] != "assistant":
        kept.pop()
        account.notes.add("unanswered-turn")
    joined: list[Turn] = []
    for turn in kept:
        role = turn.message["role"]
        before = joined[-1].message if joined else None
        if before is not None and before["role"] == role and role in ("user", "assistant"):
            joined[-1] = Turn(joined[-1].where, _joined(before, turn))
            account.notes.add("merged-turns")
        else:
            joined.append(turn)
    first = next((number for number, turn in enumerate(joined) if turn.message["role"] != "system"), None)
    if first is not None and joined[first].message["role"] == "assistant" and first < len(joined) - 1:
        opening = joined[first]
        joined[first] = Turn(opening.where, {**opening.message, "weight": 0})
        account.notes.add("opening-answer")
    return joined or list(turns)


def _joined(first: Message, second: Turn) -> Message:
    """Two turns as one: texts with an empty line between them, calls one after the other.

    Raises:
        OutOfOrder: one turn cannot say what the two say in their order: thoughts, then a text, then calls.
    """
    other = second.message
    if first.get("tool_calls") and (other.get("content") or "").strip():
        raise OutOfOrder(f"{second.where} says something after a call of its own role, and a turn calls at its end")
    if other.get("reasoning_content") and (first.get("tool_calls") or (first.get("content") or "").strip()):
        raise OutOfOrder(f"{second.where} thinks after a turn of its own role, and a turn thinks at its beginning")
    if any(first[key] != other[key] for key in ("name", "tool_call_id") if key in first and key in other):
        raise OutOfOrder(f"{second.where} follows a turn of its own role that has another name or id")
    if first.get("weight", 1) != other.get("weight", 1):
        raise OutOfOrder(f"{second.where} follows a turn of its own role, and only one of them is to be learned")
    joined = {**first, **other}
    for key, separator in (("content", "\n\n"), ("reasoning_content", "\n\n")):
        texts = [message[key] for message in (first, other) if message.get(key)]
        if texts:
            joined[key] = separator.join(texts)
    if first.get("tool_calls") or other.get("tool_calls"):
        joined["tool_calls"] = [*first.get("tool_calls", ()), *other.get("tool_calls", ())]
    return joined


def with_system(messages: Sequence[Message], policy: str, prompt: str | None) -> list[Message]:
    """The messages under the recipe's system policy; what is kept stays at its place.

    "keep" leaves system messages where they are, "drop" removes them, "merge" puts each into a user message (for
    templates without a system role): in front of the one that follows, or behind the one before it where an answer
    follows. `prompt` is the system message of rows that have none.

    Raises:
        RowError: there is no user message that a system message could be merged into.
    """
    kept = [message for message in messages if policy != "drop" or message["role"] != "system"]
    if prompt is not None and not any(message["role"] == "system" for message in kept):
        kept = [{"role": "system", "content": prompt}, *kept]
    return _merged_into_users(kept) if policy == "merge" else kept


def _merged_into_users(messages: Sequence[Message]) -> list[Message]:
    merged: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            merged.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        elif waiting:
            if not merged or merged[-1]["role"] != "user":
                raise RowError("a system message stands beside no user turn, so there is none to merge it into")
            merged[-1] = {**merged[-1], "content": "\n\n".join([merged[-1]["content"], *waiting])}
            merged.append(message)
            waiting = []
        else:
            merged.append(message)
    return merged


def unmerged(messages: Sequence[Message], prompt: str) -> list[Message]:
    """Messages that `with_system` has merged, with a system message again, so that merging them once more gives the
    same: the recipe's prompt where it opens a user message, otherwise the first paragraph of the first user message
    that has several. Every row that was merged under a prompt has one of them.
    """
    for number, message in enumerate(messages):
        if message["role"] != "user":
            continue
        text = message["content"]
        before, rest = _parted(text)
        if text.startswith(f"{prompt}\n\n"):
            before, rest = prompt, text.removeprefix(f"{prompt}\n\n")
        if before.strip() and rest.strip():
            apart = [{"role": "system", "content": before}, {**message, "content": rest}]
            return [*messages[:number], *apart, *messages[number + 1 :]]
    return list(messages)


def _parted(text: str) -> tuple[str, str]:
    """A text at its first empty line behind something that is said."""
    blank = len(text) - len(text.lstrip())
    before, _, rest = text[blank:].partition("\n\n")
    return text[:blank] + before, rest
