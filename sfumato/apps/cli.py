"""The command line: each command is a task, and the task's signature gives its flags and their defaults.

What a command adds to the task: the flags below, a progress line, and errors in one line. Exit codes: 0 done,
1 bad data or a failure at run time, 2 wrong usage or settings, 130 interrupted. Tasks import torch and the like inside
their bodies, so that help stays quick.
"""

import inspect
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from sfumato import __version__
from sfumato.apps.doctor import doctor
from sfumato.apps.fields import REQUIRED, Field, read_fields, summary
from sfumato.apps.progress import ProgressLine
from sfumato.apps.table import result_lines
from sfumato.errors import UserError
from sfumato.tasks.augment import augment
from sfumato.tasks.edit import edit
from sfumato.tasks.evaluate import evaluate
from sfumato.tasks.generate import generate
from sfumato.tasks.info import info
from sfumato.tasks.inpaint import inpaint
from sfumato.tasks.interpolate import interpolate
from sfumato.tasks.outpaint import outpaint
from sfumato.tasks.reconstruct import reconstruct
from sfumato.tasks.transfer import transfer
from sfumato.training import distill, fit

PROGRESS = ("progress", "on_progress")  # parameters of a task that are handed the progress line
FLAGS = {
    "overrides": ("--set", "KEY=VALUE"),
    "where": ("--where", "COL=VALUE"),
}  # flags not called what the parameter is called, and what follows them
JSON = typer.Option("--json", help="Print the result as JSON.")
QUIET = typer.Option("--quiet", "-q", help="Show no progress.")
DEBUG = typer.Option("--debug", help="Show where an error comes from (also: SFUMATO_DEBUG=1).")
ADDED = {"as_json": JSON, "quiet": QUIET, "debug": DEBUG}

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sfumato {__version__}")
        raise typer.Exit


VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Annotated[bool, VERSION] = False) -> None:
    """Latent diffusion models for anything you have.

    sfumato fit photos/ --out runs/photos --budget 10m, then sfumato generate runs/photos -n 64 --out samples/
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def command(
    app: typer.Typer,
    task: Callable[..., Any],
    report: Callable[[Any, Mapping[str, Any]], dict[str, Any]],
    required: Collection[str] = (),
) -> None:
    """Make a task a command.

    Args:
        app: Where to add it.
        task: The function. Its name is the command's.
        report: From what the task returned and the values it was given: what to print.
        required: Options of the task that the command line insists on.
    """
    fields = read_fields(task)
    wants = [name for name in PROGRESS if name in inspect.signature(task).parameters]

    def run(**values: Any) -> None:
        as_json, quiet, debug = (values.pop(name) for name in ADDED)
        with (
            errors_as_lines(debug, resumable="resume" in values),
            ProgressLine(quiet or not is_first_process()) as progress,
        ):
            positional = [values[field.name] for field in fields if field.positional]
            options = {field.name: values[field.name] for field in fields if not field.positional}
            result = task(*positional, **options, **dict.fromkeys(wants, progress))
            if is_first_process():
                show(report(result, values), as_json)

    parameters = [_parameter(field, field.name in required) for field in fields]
    parameters += [_keyword(name, Annotated[bool, option], False) for name, option in ADDED.items()]
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(task.__name__, help=summary(task))(run)


def is_first_process() -> bool:
    """Whether this process speaks for all of them (under `accelerate launch` there may be several)."""
    return os.environ.get("RANK", "0") == "0"


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result for a person, or for a program."""
    print(json.dumps(result, indent=2, default=str) if as_json else "\n".join(result_lines(result)))


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(field: Field, required: bool) -> inspect.Parameter:
    """A field as typer understands it."""
    kind = list[field.kind] if field.many else field.kind
    default = REQUIRED if required else list(field.default or ()) if field.many else field.default
    if field.positional:
        argument = typer.Argument(help=field.help, metavar=field.name.upper())
        return _keyword(field.name, Annotated[kind, argument], default)
    plain = ("-" if len(field.name) == 1 else "--") + field.name.replace("_", "-")
    flag, metavar = FLAGS.get(field.name, (plain, "PATH" if field.path else None))
    optional = kind | None if default is None else kind
    return _keyword(field.name, Annotated[optional, typer.Option(flag, help=field.help, metavar=metavar)], default)


@contextmanager
def errors_as_lines(debug: bool = False, resumable: bool = False) -> Iterator[None]:
    """Turn every error into one line on the error stream and an exit code; with `debug`, a traceback above it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, typer.Exit):
            raise
        debug = debug or os.environ.get("SFUMATO_DEBUG", "") not in ("", "0")
        if debug:
            traceback.print_exc()
        line, code = describe(error, resumable)
        print(f"sfumato: {' '.join(line.split())}", file=sys.stderr)
        raise typer.Exit(code) from None


def describe(error: BaseException, resumable: bool = False) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{'; go on with: ' + resume_line() if resumable else ''}", 130
    if isinstance(error, UserError):
        return str(error), error.code
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return "out of memory: take smaller batches (--batch, or --set train.denoiser.batch=64)", 1
    if "No space left" in str(error) or "StorageFull" in str(error):  # as safetensors says it
        return "No space left on device", 1
    hint = "rerun with SFUMATO_DEBUG=1 to see where it comes from"
    return f"internal error: {type(error).__name__}: {error}; {hint}", 1


def resume_line() -> str:
    """The command line that goes on where this one stopped."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return shlex.join(["sfumato", *words, "--resume"])


def _fitted(model: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """What was trained, and what to do with it."""
    return info(values["out"]) | {"next": shlex.join(["sfumato", "generate", str(values["out"]), "--out", "samples"])}


def _written(result: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """What was written where."""
    return result.summary() | {"out": values["out"]}


def _told(result: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The result itself."""
    return result


command(app, fit, report=_fitted)
command(app, distill, report=_fitted, required=("out",))
command(app, generate, report=_written, required=("out",))
command(app, reconstruct, report=_written, required=("out",))
command(app, edit, report=_written, required=("out",))
command(app, inpaint, report=_written, required=("out",))
command(app, outpaint, report=_written, required=("out",))
command(app, interpolate, report=_written, required=("out",))
command(app, transfer, report=_written, required=("out",))
command(app, augment, report=_written, required=("out",))
command(app, evaluate, report=_told)
command(app, info, report=_told)
command(app, doctor, report=_told)


def main() -> None:
    """The program."""
    try:
        code = app(prog_name="sfumato", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # those of typer about the words of the command line, whose classes are not public
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        message = getattr(error, "format_message", lambda: "stopped")()
        path = getattr(getattr(error, "ctx", None), "command_path", "sfumato")
        print(f"sfumato: {' '.join(message.split())} (see: {path} --help)", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
