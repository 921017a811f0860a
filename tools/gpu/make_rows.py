"""Rows of known sizes from the standard library's own sources: make_rows.py FOLDER

text.jsonl: 48 texts of 16,000 characters, more than 4,096 tokens each; a run splits them. chat.jsonl: 64 questions and
answers of many lengths, a quarter of each scored.
"""

import importlib
import inspect
import json
import random
import sys
from pathlib import Path

MODULES = (
    *("argparse", "asyncio", "collections", "configparser", "csv", "ctypes", "datetime", "decimal", "difflib"),
    *("fractions", "functools", "heapq", "inspect", "io", "json", "logging", "optparse", "os", "pathlib", "pickle"),
    *("pprint", "random", "re", "shutil", "smtplib", "socket", "sqlite3", "ssl", "statistics", "string", "subprocess"),
    *("tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback", "typing", "unittest", "uuid"),
    *("weakref", "zipfile"),
)
CHARACTERS = 16_000


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    source = "\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)

    def piece(start: int) -> str:
        begin = start % (len(source) - CHARACTERS)
        return source[begin : begin + CHARACTERS]

    texts = [{"text": piece(row * CHARACTERS)} for row in range(48)]
    chats = []
    for row in range(64):
        code, length = piece(row * CHARACTERS // 2), random.Random(row).randint(600, 4500)
        question = {"role": "user", "content": f"Explain this code:\n{code[:length]}"}
        answer = {"role": "assistant", "content": code[length : length + length // 3]}
        chats.append({"messages": [question, answer]})
    for name, rows in (("text", texts), ("chat", chats)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
