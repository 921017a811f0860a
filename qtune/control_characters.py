"""Characters that a terminal or page obeys instead of showing them: rows, answers and file names may hold any."""

import re

# C0 but tab and line feed; DEL; C1, of which 0x9b opens a terminal's commands as ESC [ does; and the marks that turn
# the direction of text, which show a line in another order than it has (CVE-2021-42574).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


def visible(text: str) -> str:
    """The text with each of them as its escape: \\x1b, \\u202e."""
    return _CONTROL.sub(lambda found: _escape(ord(found[0])), text)


def escaped_in_json(text: str) -> str:
    """A JSON text with those that `json.dumps` leaves as they are (it escapes C0 only) as \\u escapes."""
    return re.sub("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
