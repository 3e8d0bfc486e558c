"""The command line: each command is a task, whose signature gives its flags and their defaults.

A command adds to its task the common options below, a progress bar, and errors in one line. Exit codes: 0 success,
1 bad data or a failure at run time, 2 wrong usage or settings, 130 interrupted. Tasks import torch and other large
packages inside their bodies, so that help is fast.
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
from sfumato.apps.format import result_lines
from sfumato.apps.progress import ProgressLine
from sfumato.apps.signature import REQUIRED, Field, read_fields, summary
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
from sfumato.tasks.transfer.task import transfer
from sfumato.training import distill, fit

PROGRESS_PARAMETERS = ("progress", "on_progress")  # parameters of a task that receive the progress bar
# flags and placeholders by parameter, where they differ from the parameter's name
FLAGS = {"overrides": ("--set", "KEY=VALUE"), "where": ("--where", "COL=VALUE")}
COMMON_OPTIONS = {
    "as_json": (("--json",), "Print the result as JSON."),
    "quiet": (("--quiet", "-q"), "Show no progress."),
    "debug": (("--debug",), "Show the traceback of an error (also: SFUMATO_DEBUG=1)."),
}


class Group(click.Group):
    """A group that lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
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
    """A command whose help describes its arguments too, not only its options.

    Args:
        name: The command's name.
        arguments: Name and description of each argument.
        kwargs: Arguments of `click.Command`.
    """

    def __init__(self, name: str, *, arguments: Sequence[tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        self.arguments = arguments

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write arguments and options."""
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
    """Add a task as a command.

    Args:
        app: The group of commands.
        task: The function, whose name is the command's.
        report: (the task's result, the values of its fields) -> what to print.
        required: Options that are required on the command line.
    """
    fields = read_fields(task)
    progress_names = [name for name in PROGRESS_PARAMETERS if name in inspect.signature(task).parameters]

    def callback(**values: Any) -> None:
        import logging

        as_json, quiet, debug = (values.pop(name) for name in COMMON_OPTIONS)
        logging.getLogger("sfumato").setLevel(logging.ERROR if quiet else logging.NOTSET)
        with (
            errors_as_lines(debug, resumable="resume" in values),
            ProgressLine(quiet or not is_first_process()) as progress,
        ):
            positional = [values[field.name] for field in fields if field.positional]
            options = {field.name: _given(field, values[field.name]) for field in fields if not field.positional}
            result = task(*positional, **options, **dict.fromkeys(progress_names, progress))
            if is_first_process():
                show(report(result, values), as_json)

    parameters = [_parameter(field, field.name in required) for field in fields]
    parameters += [
        click.Option([name, *flags], is_flag=True, help=help) for name, (flags, help) in COMMON_OPTIONS.items()
    ]
    arguments = [(field.name.upper(), _argument_help(field)) for field in fields if field.positional]
    app.add_command(
        Command(task.__name__, callback=callback, params=parameters, help=summary(task), arguments=arguments)
    )


def is_first_process() -> bool:
    """Whether this is the process that prints (`accelerate launch` starts several)."""
    return os.environ.get("RANK", "0") == "0"


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result as lines, or as JSON."""
    print(json.dumps(result, indent=2, default=str) if as_json else "\n".join(result_lines(result)))


def _parameter(field: Field, required: bool) -> click.Parameter:
    """The parameter of click for a field."""
    required = required or field.default is REQUIRED
    type_ = click.Choice(get_args(field.type)) if get_origin(field.type) is Literal else field.type
    common: dict[str, Any] = {"type": type_, "required": required} | ({} if required else {"default": field.default})
    if field.positional:
        return click.Argument([field.name], nargs=-1 if field.many else 1, **common)
    default_flag = ("-" if len(field.name) == 1 else "--") + field.name.replace("_", "-")
    flag, metavar = FLAGS.get(field.name, (default_flag, "PATH" if field.path else None))
    common |= {"help": field.help, "metavar": metavar, "show_default": True}
    return click.Option([field.name, flag], is_flag=type_ is bool, multiple=field.many, **common)


def _given(field: Field, value: Any) -> Any:
    """The value of an option: its default if it may be given several times and is not given."""
    return field.default if field.many and not value else value


def _argument_help(field: Field) -> str:
    """The description of a positional argument, with its default."""
    return field.help if field.default in (REQUIRED, None) else f"{field.help}  [default: {field.default}]"


@contextmanager
def errors_as_lines(debug: bool = False, resumable: bool = False) -> Iterator[None]:
    """Print errors as one line on the error stream, after the traceback with `debug`, and exit with their code."""
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
    """The message and exit code of an error."""
    if isinstance(error, KeyboardInterrupt):
        if error.args:
            return f"interrupted; {error}", 130
        return f"interrupted{'; continue with: ' + resume_line() if resumable else ''}", 130
    if isinstance(error, UserError):
        return str(error), error.code
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        fit = "--set train.codec.batch=8, train.denoiser.batch=64"
        return f"out of memory: use smaller batches (--batch; for fit: {fit})", 1
    if "No space left" in str(error) or "StorageFull" in str(error):  # messages of safetensors
        return "No space left on device", 1
    hint = "rerun with SFUMATO_DEBUG=1 for a traceback"
    return f"internal error: {type(error).__name__}: {error}; {hint}", 1


def resume_line() -> str:
    """The command line that resumes this run."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return shlex.join(["sfumato", *words, "--resume"])


def _model_report(model: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The trained model, and the next command."""
    words = ["sfumato", "generate", str(values["out"]), "--out", model.modality.example_output]
    return info(values["out"]) | {"next": shlex.join(words)}


def _output_report(result: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The result's summary and output path."""
    return result.summary() | {"out": values["out"]}


def _full_report(result: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The result itself."""
    return result


command(app, fit, report=_model_report)
command(app, distill, report=_model_report, required=("out",))
command(app, generate, report=_output_report, required=("out",))
command(app, reconstruct, report=_output_report, required=("out",))
command(app, edit, report=_output_report, required=("out",))
command(app, inpaint, report=_output_report, required=("out",))
command(app, outpaint, report=_output_report, required=("out",))
command(app, interpolate, report=_output_report, required=("out",))
command(app, transfer, report=_output_report, required=("out",))
command(app, augment, report=_output_report, required=("out",))
command(app, evaluate, report=_full_report)
command(app, info, report=_full_report)
command(app, doctor, report=_full_report)


def main() -> None:
    """Entry point: run the command line and exit."""
    code = run()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader may be gone
            stream.flush()
    if code:
        os._exit(code)  # running threads of some libraries abort a process that exits normally
    sys.exit(0)


def run() -> int:
    """Run the command line; return the exit code."""
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
