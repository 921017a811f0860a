"""The house: rooms in the order in which a run meets them, and imports that point one way, from the roof down.

All imports count: those under TYPE_CHECKING and inside functions too, for a type is knowledge as well.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "qtune"

ROOMS = (
    "errors",
    "disk",
    "control_characters",
    "startup",
    "console",
    "cache",
    "sizes",
    "spelling",
    "whole",
    "records",
    "manifest",
    "lfs",
    "network",
    "recipe",
    "device",
    "data",
    "plan",
    "kernels",
    "model",
    "run",
    "adapter",
    "tuned",
    "memory.tracing",
    "timing.price",
    "timing.known",
    "memory",
    "memory.measured",
    "timing",
    "export",
    "export.verify",
    "export.gguf",
    "export.export",
    "verdicts",
    "comparing",
    "at_once",
    "preflight",
    "training",
    "report",
    "check",
    "diagnosis",
    "doctor",
    "init",
    "swap",
    "screens",
    "verbs",
    "commands",
    "cli",
    "__main__",
)
"""From the ground up: a room imports from those before it alone."""

HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets"}

LIGHT = (
    "at_once", "cli", "commands", "console", "diagnosis", "errors", "disk", "init", "plan", "cache",
    "control_characters", "sizes", "spelling", "whole", "records", "manifest", "lfs", "startup", "recipe", "screens",
    "verbs", "device.cards", "data.swap_files", "run.folder", "run.finished", "run.resolved", "run.resumption",
    "export.conflicts", "export.output", "tuned.target", "report.page", "verdicts",
)  # fmt: skip
"""Rooms and files that a user waits for when he asks for help or mistypes a key: they import nothing heavy."""


class Import(NamedTuple):
    """One imported module, as `import a.b` or `from a.b import c` names it, and whether it happens on loading."""

    module: str
    line: int
    on_loading: bool


def modules(package: Path) -> dict[str, Path]:
    """The modules of a package by their dotted names below it; folders of modules are no modules themselves."""
    files = sorted(file for file in package.rglob("*.py") if file.name != "__init__.py")
    return {".".join(file.relative_to(package).with_suffix("").parts): file for file in files}


def imports(file: Path) -> tuple[Import, ...]:
    """Every import of a file; `from a import b` counts as a.b as well, which may be a module."""
    return imports_in(file.read_text(encoding="utf-8"), file)


@cache
def imports_in(text: str, file: Path) -> tuple[Import, ...]:
    """Of a file with this text, which many tests ask for."""
    return tuple(_imports(ast.parse(text), file))


def _imports(tree: ast.Module, file: Path) -> Iterator[Import]:
    later = {id(inner) for node in ast.walk(tree) if is_later(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative imports hide where they point"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield Import(name, node.lineno, id(node) not in later)


def is_later(node: ast.AST) -> bool:
    """Whether what stands in this node is not run when the file is loaded."""
    is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return is_typing or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def module_of(name: str, known: Mapping[str, Path], package: Path) -> str | None:
    """The module of the package that an imported name is in or is; None for other packages and for the package."""
    parts = name.split(".")
    if parts[0] != package.name:
        return None
    own = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
    return next((candidate for candidate in own if candidate in known), None)


def arrows(package: Path) -> dict[str, dict[str, int]]:
    """For each module the modules of the package that it imports, with a line where it does."""
    known = modules(package)
    return {
        module: {
            target: one.line for one in imports(file) if (target := module_of(one.module, known, package)) is not None
        }
        for module, file in known.items()
    }


def room_of(module: str, rooms: tuple[str, ...]) -> str:
    """The room with the longest name that a module is in: memory.tracing.step is in memory.tracing, not in memory."""
    held = [room for room in rooms if module == room or module.startswith(f"{room}.")]
    assert held, f"{module}: on no floor; give its room a place in ROOMS"
    return max(held, key=len)


def upward(package: Path, rooms: tuple[str, ...] = ROOMS) -> list[str]:
    """The imports that point from a room to one above it."""
    found = []
    for module, targets in arrows(package).items():
        for target, line in targets.items():
            here, there = room_of(module, rooms), room_of(target, rooms)
            if rooms.index(there) > rooms.index(here):
                found.append(f"{module}:{line} imports {target}, which is above it")
    return found


def circles(graph: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Modules that import each other in a ring, the shortest ring through each; a ring is listed once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in graph:
        reached: dict[str, str] = {}
        waiting = [start]
        while waiting and start not in reached:
            module = waiting.pop(0)
            for target in graph.get(module, {}):
                if target not in reached:
                    reached[target] = module
                    waiting.append(target)
        if start in reached:
            ring = [start]
            while (before := reached[ring[0]]) != start:
                ring.insert(0, before)
            found.setdefault(frozenset(ring), [start, *ring])
    return list(found.values())


def heavy_imports(package: Path, module: str) -> list[str]:
    """The ways from a module, by what is imported on loading, to a library that takes seconds."""
    known = modules(package)
    found, seen, waiting = [], {module}, [(module, module)]
    while waiting:
        current, way = waiting.pop()
        for one in imports(known[current]):
            if not one.on_loading:
                continue
            if one.module.split(".")[0] in HEAVY:
                found.append(f"{way} -> {one.module}")
            target = module_of(one.module, known, package)
            if target is not None and target not in seen:
                seen.add(target)
                waiting.append((target, f"{way} -> {target}"))
    return found


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A made-up package of three rooms: ground < stage < roof."""
    package = tmp_path / "house"
    files = {
        "ground.py": "",
        "stage/__init__.py": "",
        "stage/first.py": "from house.ground import stone\n",
        "stage/second.py": "from house.stage import first\n",
        "roof.py": "def run():\n    from house.stage.second import step\n",
    }
    for name, text in files.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return package


FLOORS = ("ground", "stage", "roof")


def test_the_imports_of_a_sound_house_are_all_seen(house: Path) -> None:
    assert arrows(house) == {
        "ground": {},
        "stage.first": {"ground": 1},
        "stage.second": {"stage.first": 1},
        "roof": {"stage.second": 2},
    }
    assert upward(house, FLOORS) == []
    assert circles(arrows(house)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import house.roof\n",
        "from house import roof\n",
        "from house.roof import run\n",
        "def later():\n    from house.roof import run\n",
        "if TYPE_CHECKING:\n    from house.roof import run\n",
    ],
    ids=["import", "from the package", "from the module", "inside a function", "for a type"],
)
def test_an_upward_import_is_found_however_it_is_written(house: Path, text: str) -> None:
    (house / "stage" / "first.py").write_text(text)
    line = text[: text.index("house")].count("\n") + 1
    assert upward(house, FLOORS) == [f"stage.first:{line} imports roof, which is above it"]


def test_a_circle_inside_a_room_is_found(house: Path) -> None:
    (house / "stage" / "first.py").write_text("def later():\n    from house.stage.second import step\n")
    assert upward(house, FLOORS) == []
    assert [set(ring) for ring in circles(arrows(house))] == [{"stage.first", "stage.second"}]


def test_a_file_that_is_on_no_floor_is_named(house: Path) -> None:
    (house / "shed.py").write_text("import house.ground\n")
    with pytest.raises(AssertionError, match="shed: on no floor"):
        upward(house, FLOORS)


def test_a_heavy_library_is_found_behind_other_files_but_not_inside_functions(house: Path) -> None:
    (house / "roof.py").write_text("from house.stage import second\n")
    assert heavy_imports(house, "roof") == []
    (house / "ground.py").write_text("def later():\n    import torch\n")
    assert heavy_imports(house, "roof") == []
    (house / "ground.py").write_text("try:\n    import torch.nn\nexcept ImportError:\n    pass\n")
    assert heavy_imports(house, "roof") == ["roof -> stage.second -> stage.first -> ground -> torch.nn"]


def test_no_import_points_upward() -> None:
    assert upward(PACKAGE) == []


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert circles(arrows(PACKAGE)) == []


@pytest.mark.parametrize("room", LIGHT)
def test_what_answers_at_once_imports_nothing_heavy(room: str) -> None:
    held = [module for module in modules(PACKAGE) if module == room or module.startswith(f"{room}.")]
    assert held, f"{room} is no room any more"
    assert [way for module in held for way in heavy_imports(PACKAGE, module)] == []


def doubled_classes(package: Path) -> dict[str, list[str]]:
    """Public classes that more than one module defines, with these modules."""
    where: dict[str, list[str]] = {}
    for module, file in modules(package).items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(module)
    return {name: found for name, found in where.items() if len(found) > 1}


def test_a_class_name_that_means_two_things_is_found(house: Path) -> None:
    (house / "ground.py").write_text("class Stone: ...\nclass _Sand: ...\n")
    (house / "roof.py").write_text("class Stone: ...\nclass _Sand: ...\n")
    assert doubled_classes(house) == {"Stone": ["ground", "roof"]}


def test_every_public_class_has_a_name_of_its_own() -> None:
    assert doubled_classes(PACKAGE) == {}


def test_the_readme_shows_every_room_in_this_order() -> None:
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("    qtune/\n")[2].partition("\n\n")[0]
    shown = [room for room, _ in re.findall(r"^ {6}(\w+)(/|\.py) +\S", tree, re.MULTILINE)]
    outer = [room for room in ROOMS if "." not in room and room != "__main__"]
    assert shown == [room for room in outer if any((PACKAGE / name).exists() for name in (room, f"{room}.py"))]


def test_every_file_of_the_package_is_on_a_floor() -> None:
    assert [module for module in modules(PACKAGE) if not room_of(module, ROOMS)] == []


def named_files(text: str) -> list[str]:
    """The files of the package that a text names, `room/{one,other}.py` as two."""
    named = []
    for folder, together, alone in re.findall(r"\b((?:\w+/)+)(?:\{([\w,]+)\}|(\w+))\.py", text):
        named += [f"{folder}{name}.py" for name in (together or alone).split(",")]
    return [name for name in named if not name.startswith(("tests/", "tools/"))]


def test_the_files_that_a_text_names_are_found_in_it() -> None:
    text = "see `run/{lock,folder}.py`, then export/verify/rows.py; tests/test_x.py holds it"
    assert named_files(text) == ["run/lock.py", "run/folder.py", "export/verify/rows.py"]


def test_who_asks_what_happens_on_a_run_is_sent_to_one_file_that_names_the_stages_and_their_files() -> None:
    story = ast.get_docstring(ast.parse((PACKAGE / "training" / "train.py").read_text(encoding="utf-8"))) or ""
    assert story.startswith("What happens on `qtune run`")
    stages = [line.split()[0] for line in story.splitlines()[2:]]
    assert stages == ["recipe", "inputs", "folder", "model", "lock", "trainer", "steps", "adapter", "report"]
    for document in ("README.md", "CONTRIBUTING.md"):
        assert "training/train.py" in (PACKAGE.parent / document).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_of_the_documents_leads_to_a_page_and_a_heading() -> None:
    root = PACKAGE.parent
    pages = [*root.glob("*.md"), *root.glob("docs/*.md")]
    assert len(pages) > 8
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith(("http", "mailto")):
                continue
            name, _, anchor = target.partition("#")
            meant = (page.parent / name).resolve() if name else page
            assert meant.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(meant.read_text(encoding="utf-8")), f"{page.name}: {target}"


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "qtune/training/train.py"])
def test_every_file_that_a_guide_names_is_there(document: str) -> None:
    named = named_files((PACKAGE.parent / document).read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (PACKAGE / name).is_file()] == []


def missing_tools(root: Path) -> list[str]:
    """Tools and tests that the package, its tools or its documents name and that are not there."""
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *(root / "qtune").rglob("*.py"), *(root / "tools").iterdir()]
    texts = {page: page.read_text(encoding="utf-8") for page in pages if page.is_file()}
    found = {page.name: re.findall(r"\b(?:tools|tests)/\w+\.\w+", text) for page, text in texts.items()}
    named = {(page, name) for page, names in found.items() for name in names}
    return sorted(f"{page}: {name}" for page, name in named if not (root / name).is_file())


def test_every_tool_and_test_that_is_named_anywhere_is_there(house: Path) -> None:
    assert missing_tools(PACKAGE.parent) == []
    for name in ("qtune", "tools"):
        (house / name).mkdir(exist_ok=True)
    (house / "README.md").write_text("by `tools/here.sh`, then tools/gone.py")
    (house / "tools" / "here.sh").write_text("see tests/test_gone.py")
    assert missing_tools(house) == ["README.md: tools/gone.py", "here.sh: tests/test_gone.py"]
