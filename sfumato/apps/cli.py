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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args, get_origin

import click

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
ADDED = {
    "as_json": (("--json",), "Print the result as JSON."),
    "quiet": (("--quiet", "-q"), "Show no progress."),
    "debug": (("--debug",), "Show where an error comes from (also: SFUMATO_DEBUG=1)."),
}


class Group(click.Group):
    """Commands that help lists in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(self.commands)


@click.group(cls=Group, invoke_without_command=True)
@click.version_option(__version__, prog_name="sfumato", message="%(prog)s %(version)s", help="Show the version.")
@click.pass_context
def app(context: click.Context) -> None:
    """Latent diffusion models for anything you have.

    sfumato fit photos/ --out runs/photos --budget 10m, then sfumato generate runs/photos -n 64 --out samples/
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


class Command(click.Command):
    """A command whose help lists its arguments with what they mean, as it does its options.

    Args:
        name: What it is called.
        arguments: Name and meaning of each argument.
        kwargs: As of `click.Command`.
    """

    def __init__(self, name: str, *, arguments: Sequence[tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        self.arguments = arguments

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write both lists."""
        if self.arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(self.arguments)
        super().format_options(ctx, formatter)


def command(
    app: click.Group,
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

    def called(**values: Any) -> None:
        import logging

        as_json, quiet, debug = (values.pop(name) for name in ADDED)
        logging.getLogger("sfumato").setLevel(logging.ERROR if quiet else logging.NOTSET)
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
    parameters += [click.Option([name, *flags], is_flag=True, help=help) for name, (flags, help) in ADDED.items()]
    arguments = [(field.name.upper(), _argument_help(field)) for field in fields if field.positional]
    app.add_command(Command(task.__name__, callback=called, params=parameters, help=summary(task), arguments=arguments))


def is_first_process() -> bool:
    """Whether this process speaks for all of them (under `accelerate launch` there may be several)."""
    return os.environ.get("RANK", "0") == "0"


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result for a person, or for a program."""
    print(json.dumps(result, indent=2, default=str) if as_json else "\n".join(result_lines(result)))


def _parameter(field: Field, required: bool) -> click.Parameter:
    """A field as click understands it."""
    required = required or field.default is REQUIRED
    kind = click.Choice(get_args(field.kind)) if get_origin(field.kind) is Literal else field.kind
    common: dict[str, Any] = {"type": kind, "required": required} | ({} if required else {"default": field.default})
    if field.positional:
        return click.Argument([field.name], nargs=-1 if field.many else 1, **common)
    plain = ("-" if len(field.name) == 1 else "--") + field.name.replace("_", "-")
    flag, metavar = FLAGS.get(field.name, (plain, "PATH" if field.path else None))
    common |= {"help": field.help, "metavar": metavar, "show_default": True}
    return click.Option([field.name, flag], is_flag=kind is bool, multiple=field.many, **common)


def _argument_help(field: Field) -> str:
    return field.help if field.default in (REQUIRED, None) else f"{field.help}  [default: {field.default}]"


@contextmanager
def errors_as_lines(debug: bool = False, resumable: bool = False) -> Iterator[None]:
    """Turn every error into one line on the error stream and an exit code; with `debug`, a traceback above it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, click.exceptions.Exit):
            raise
        debug = debug or os.environ.get("SFUMATO_DEBUG", "") not in ("", "0")
        if debug:
            traceback.print_exc()
        line, code = describe(error, resumable)
        print(f"sfumato: {' '.join(line.split())}", file=sys.stderr)
        raise click.exceptions.Exit(code) from None


def describe(error: BaseException, resumable: bool = False) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        if error.args:
            return f"interrupted; {error}", 130
        return f"interrupted{'; go on with: ' + resume_line() if resumable else ''}", 130
    if isinstance(error, UserError):
        return str(error), error.code
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        fit = "--set train.codec.batch=8, train.denoiser.batch=64"
        return f"out of memory: take smaller batches (--batch; of fit: {fit})", 1
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
    words = ["sfumato", "generate", str(values["out"]), "--out", model.modality.example]
    return info(values["out"]) | {"next": shlex.join(words)}


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
    code = run()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it may be gone
            stream.flush()
    if code:
        os._exit(code)  # threads of libraries may still be reading, and some abort a process that ends the usual way
    sys.exit(0)


def run() -> int:
    """Do what the command line says; gives the exit code."""
    try:
        code = app(prog_name="sfumato", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        code = 130
    except click.ClickException as error:
        code = error.exit_code
        context = error.ctx if isinstance(error, click.UsageError) else None
        path = context.command_path if context else "sfumato"
        print(f"sfumato: {' '.join(error.format_message().split())} (see: {path} --help)", file=sys.stderr)
    return code if isinstance(code, int) else 0
