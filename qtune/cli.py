"""The command line: its verbs in the order of its help, and what becomes of their errors: messages and exit codes."""

import os
import sys
from traceback import walk_tb
from typing import Annotated

import typer

from qtune import __version__, console
from qtune.commands.chat import chat
from qtune.commands.check import check
from qtune.commands.compare import compare
from qtune.commands.doctor import doctor
from qtune.commands.eval import evaluate
from qtune.commands.export import export
from qtune.commands.fit import fit
from qtune.commands.init import init
from qtune.commands.list import list_all
from qtune.commands.profile import profile
from qtune.commands.report import report
from qtune.commands.run import run
from qtune.commands.shared import load_libraries
from qtune.commands.swap import swap
from qtune.disk import refusal_of
from qtune.errors import InputError, Interrupted, Problem, QtuneError, SaidElsewhere, first_line
from qtune.startup.allocator import use_expandable_segments
from qtune.startup.interrupts import take_interrupts
from qtune.startup.launched import forget_launcher, is_to_meet, launched, use_own_card
from qtune.startup.quiet import quiet_libraries
from qtune.startup.streams import BROKEN_PIPE_CODE, OutputEndedError, guard_streams
from qtune.startup.waiting_threads import let_waiting_threads_sleep
from qtune.verbs import Verbs

app = typer.Typer(
    name="qtune",
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune large language models in 4 bits on one ordinary graphics card.",
    epilog="Exit codes: 0 done · 1 the work failed · 2 the input is wrong · 130 interrupted, state saved · "
    "141 nobody reads the results any more.",
)

VERBS = (
    ("Prepare", "init", init),
    ("Prepare", "check", check),
    ("Prepare", "doctor", doctor),
    ("Prepare", "profile", profile),
    ("Prepare", "fit", fit),
    ("Prepare", "swap", swap),
    ("Train", "run", run),
    ("Try", "eval", evaluate),
    ("Try", "compare", compare),
    ("Try", "chat", chat),
    ("Use", "export", export),
    ("Runs", "list", list_all),
    ("Runs", "report", report),
)
"""Under which heading of the help, by which name, and what is called."""
for panel, name, verb in VERBS:
    app.command(name=name, rich_help_panel=panel)(verb)

TRACKING = "transformers.integrations.integration_utils"
"""Where experiment trackers are called. What they refuse, as a key that nobody has given, each says in its own way."""


def _version(value: bool) -> None:
    if value:
        console.out(f"qtune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if launched().processes > 1 and context.invoked_subcommand != "run":
        forget_launcher(os.environ)  # there is nobody to meet: each says it, and ends
        raise InputError(Problem("WORLD_SIZE", "only qtune run shares its work out; start this without a launcher"))


def main() -> None:
    """The `qtune` command: an error meant for the user becomes a message and an exit code, any other a traceback."""
    quiet_libraries()
    use_expandable_segments()
    let_waiting_threads_sleep()
    use_own_card()
    guard_streams()
    take_interrupts()
    try:
        try:
            _parse_and_run()
        finally:  # what is still in the buffer may be what cannot be written
            sys.stdout.flush()
    except OutputEndedError as error:
        if error.reader_left:
            sys.exit(BROKEN_PIPE_CODE)
        console.say_error(str(error))
        sys.exit(1)
    except Interrupted as stopped:
        # What the user asked for is no error.
        console.say(str(stopped))
        sys.exit(stopped.exit_code)
    except SaidElsewhere as error:
        sys.exit(error.exit_code)
    except QtuneError as error:
        console.say_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.say("stopped")
        sys.exit(130)
    except Exception as error:
        if (known := _told(error)) is None:
            raise
        console.say_error(known)
        sys.exit(1)


def _parse_and_run() -> None:
    """The command. What stops one of several processes before they have met ends all, and is said once."""
    try:
        app()
    except QtuneError as raised:
        from qtune.recipe.places import located

        error = located(raised)
        if is_to_meet():
            raise _said_once(error) from raised
        if error is raised:
            raise
        raise error from raised


def _said_once(error: QtuneError) -> QtuneError:
    load_libraries()
    from qtune.training.meeting import end_together

    return end_together(error)


def _told(error: Exception) -> str | None:
    """What is said of an error that nobody has raised on purpose, and that is none of ours; None: a bug of ours."""
    if (refused := refusal_of(error)) is not None:
        return refused
    if "torch" not in sys.modules:
        return None
    if TRACKING in {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}:
        return f"training.trackers: {first_line(error).rstrip('.')}; without it: --set 'training.trackers=[]'"
    from qtune.device.present import is_out_of_memory, memory_ran_out

    if not is_out_of_memory(error):
        return None
    return str(memory_ran_out(error, "Close what else takes memory, or use a larger device"))
