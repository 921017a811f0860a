"""Makes instruction rows from the docstrings of the running interpreter's standard library.

    python tools/make_docstring_data.py docstrings.jsonl              # every row, several thousand
    python tools/make_docstring_data.py docstrings.jsonl --rows 500   # a sample, the same on every call

Nobody wrote these texts for us, and their lengths vary as real answers do: from five words to several pages. Python
sources are parsed, never imported, so no module's side effects run; only a fixed list of modules written in C is
imported, for there is no other way to their docstrings. Rows depend on the interpreter's version and platform only.
"""

import argparse
import ast
import importlib
import inspect
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Tests, programs, and folders that hold other people's packages: not the library's documentation.
SKIPPED = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data",
    "ensurepip", "config",
}  # fmt: skip
# Written in C, harmless to import, with docstrings worth asking for: the name people know -> the module to import.
C_MODULES = {name: name for name in (
    "array", "atexit", "binascii", "builtins", "cmath", "errno", "faulthandler", "gc", "itertools", "marshal", "math",
    "mmap", "pwd", "resource", "select", "sys", "syslog", "time", "unicodedata", "zlib",
)} | {"os": "posix", "functools": "_functools", "collections": "_collections"}  # fmt: skip
SHORTEST_ANSWER = 20
SEED = 11


@dataclass(frozen=True)
class Documented:
    """One public name of the library with its docstring, and its signature where there is one."""

    name: str
    kind: Literal["module", "class", "function", "method"]
    doc: str
    signature: str = ""


def library_files() -> list[tuple[str, Path]]:
    """(module name, source file) of every public pure-Python module, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        names = parts[:-1] if parts[-1] == "__init__" else parts
        public = names and names[0] in sys.stdlib_module_names and not any(name.startswith("_") for name in names)
        if public and not SKIPPED & set(parts):
            found.append((".".join(names), file))
    return sorted(found)


def documented_in_source(module: str, source: str) -> Iterator[Documented]:
    """Every public name of a module's source that has a docstring. Nothing is executed."""
    tree = ast.parse(source)
    if doc := ast.get_docstring(tree):
        yield Documented(module, "module", doc)
    yield from documented_in_body(tree.body, module, inside_class=False)


def documented_in_body(body: list[ast.stmt], prefix: str, *, inside_class: bool) -> Iterator[Documented]:
    for node in body:
        match node:
            case ast.ClassDef(name=name) if not name.startswith("_"):
                if doc := ast.get_docstring(node):
                    yield Documented(f"{prefix}.{name}", "class", doc)
                yield from documented_in_body(node.body, f"{prefix}.{name}", inside_class=True)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if not name.startswith("_"):
                if doc := ast.get_docstring(node):
                    signature = f"{name}({ast.unparse(node.args)})"
                    yield Documented(f"{prefix}.{name}", "method" if inside_class else "function", doc, signature)
            case ast.If() | ast.Try():
                for inner in (node.body, node.orelse, getattr(node, "finalbody", [])):
                    yield from documented_in_body(inner, prefix, inside_class=inside_class)


def documented_in_c_module(name: str, imported: str) -> Iterator[Documented]:
    """The public names of a module that is written in C; nothing where this platform does not have it."""
    try:
        module = importlib.import_module(imported)
    except ImportError:
        return
    if module.__doc__:
        yield Documented(name, "module", inspect.cleandoc(module.__doc__))
    for label, member in sorted(vars(module).items()):
        if label.startswith("_") or getattr(member, "__module__", name) not in (name, imported, "builtins"):
            continue
        if inspect.isbuiltin(member) or inspect.isclass(member):
            yield from documented_object(f"{name}.{label}", label, member)


def documented_object(name: str, label: str, member: object) -> Iterator[Documented]:
    doc = inspect.getdoc(member)
    if not doc:
        return
    if not inspect.isclass(member):
        yield Documented(name, "function", doc, signature_of(label, member))
        return
    yield Documented(name, "class", doc)
    for own, method in sorted(vars(member).items()):
        if not own.startswith("_") and callable(method) and (method_doc := inspect.getdoc(method)):
            yield Documented(f"{name}.{own}", "method", method_doc, signature_of(own, method))


def signature_of(label: str, member: object) -> str:
    try:
        return f"{label}{inspect.signature(member)}"  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError):  # select.epoll.register in 3.13: AttributeError
        return ""


def questions_about(item: Documented) -> Iterator[tuple[str, str]]:
    """The (question, answer) pairs that one docstring gives."""
    what = {
        "module": f"What is the module {item.name} for?",
        "class": f"What is the class {item.name}?",
        "function": f"What does {item.name} do?",
        "method": f"What does the method {item.name} do?",
    }[item.kind]
    yield what, item.doc
    if item.signature:
        yield f"What is the signature of {item.name}?", item.signature
    summary, _, rest = item.doc.partition("\n\n")
    if rest and " -> " not in summary:  # "reduce(function, iterable) -> value" describes nothing
        yield f"Describe {item.name} in one paragraph.", " ".join(summary.split())


def make_rows(limit: int | None = None) -> list[dict[str, list[dict[str, str]]]]:
    """Rows in the "messages" form, shuffled with a fixed seed; `limit` keeps the first ones."""
    items = [item for module, file in library_files() for item in documented_in_source(module, read_source(file))]
    items += [item for name, imported in C_MODULES.items() for item in documented_in_c_module(name, imported)]
    answers: dict[str, str] = {}
    for item in items:
        for question, answer in questions_about(item):
            if len(answer.strip()) >= SHORTEST_ANSWER:
                answers.setdefault(question, answer.strip())
    pairs = sorted(answers.items())
    random.Random(SEED).shuffle(pairs)
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs[:limit]
    ]


def read_source(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write, JSON lines")
    parser.add_argument("--rows", type=int, help="how many rows (default: all)")
    arguments = parser.parse_args()
    rows = make_rows(arguments.rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    arguments.output.write_text(text, encoding="utf-8")
    print(f"{arguments.output}: {len(rows)} rows")


if __name__ == "__main__":
    main()
