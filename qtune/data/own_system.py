"""The system message that a chat template writes of itself where a conversation has none."""

from qtune.data.conversation import RowError
from qtune.data.template import Renderer

_GIVEN, _ASKED = "A message of another system.", "A question."


def own_system(renderer: Renderer) -> str | None:
    """Its text: what stands, without a system message, in the place where a given one would; None of templates that
    write none, that take none, or that write it elsewhere."""
    system, asked = {"role": "system", "content": _GIVEN}, {"role": "user", "content": _ASKED}
    try:
        given, without = renderer.render([system, asked]), renderer.render([asked])
    except RowError:
        return None
    before, _, rest = given.partition(_GIVEN)
    after = rest.partition(_ASKED)[0]
    if not after or not without.startswith(before):
        return None
    text, found, _ = without.removeprefix(before).partition(after + _ASKED)
    return text.strip() or None if found else None
