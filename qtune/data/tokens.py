"""The tokens of a text, found by the characters they stand for."""

from collections.abc import Sequence

from tokenizers import Encoding


class Tokens:
    """The ids of a text that was encoded in one or more pieces, found by character."""

    def __init__(self, parts: Sequence[tuple[Encoding, int, int]]) -> None:
        """`parts` are encodings with the position of their first character and of their first token."""
        self.parts = parts
        self.ids: list[int] = [token for encoding, _, _ in parts for token in encoding.ids]

    def token_at(self, char: int) -> int:
        """The first token that holds `char` or, where none does (a space that was trimmed), a later one."""
        for encoding, char_start, token_start in reversed(self.parts):
            if char >= char_start:
                end = encoding.token_to_chars(len(encoding) - 1) if len(encoding) else None
                for position in range(char - char_start, end[1] if end else 0):
                    token = encoding.char_to_token(position)
                    if token is not None:
                        return token_start + token
                return token_start + len(encoding)
        raise IndexError(char)

    def last_token_before(self, char: int) -> int:
        """The last token that holds characters before `char`."""
        for encoding, char_start, token_start in reversed(self.parts):
            if char > char_start:
                for position in range(char - char_start - 1, -1, -1):
                    token = encoding.char_to_token(position)
                    if token is not None:
                        # Several tokens may share a character: the bytes of an emoji.
                        span = encoding.token_to_chars(token)
                        while token + 1 < len(encoding) and encoding.token_to_chars(token + 1) == span:
                            token += 1
                        return token_start + token
        return -1

    def chars(self, token: int) -> tuple[int, int]:
        """The characters [start, end) that a token stands for."""
        for encoding, char_start, token_start in reversed(self.parts):
            if token >= token_start:
                start, end = encoding.token_to_chars(token - token_start) or (0, 0)
                return start + char_start, end + char_start
        raise IndexError(token)
