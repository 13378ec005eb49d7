"""The command line: thin commands over the library, one error boundary. Importing it loads neither torch nor transformers."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback

import click

from paft.errors import PaftError, is_out_of_memory, one_line

SMALLER = "use a smaller batch (--set trainer.per_device_train_batch_size=1)"
EPILOG = "Start with `paft run demo`. Every command: `paft COMMAND --help`."


class Sections(click.Group):
    """A group that lists its commands in the order of the flow, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Sections, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paft", prog_name="paft")
def cli() -> None:
    """LLM post-training by merging: an L1-sparse SFT adapter and a DPO adapter, trained in parallel, merged into one model."""


def _register() -> None:
    from paft.cli import analysis, compare, delta, doctor, merge, report, search, system, train

    for command in (system.run, train.train_sft, train.train_dpo, train.train_joint, merge.merge, merge.methods, delta.delta,
                    analysis.sparsity_report, analysis.interference, report.evaluate, compare.compare, search.search,
                    system.recipes, system.verify, doctor.doctor):
        cli.add_command(command)


_register()


def main() -> None:
    """Entry point of ``paft``: exit codes as in `paft.errors`, one line and a hint for what a user can mend."""
    for name in ("SIGTERM", "SIGHUP"):  # a scheduler's or a terminal's end cleans up as Ctrl-C does; nohup stays ignored
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), _interrupt)
    code = invoke(sys.argv[1:])
    if sys.argv[1:2] != ["merge"]:
        sys.exit(code)
    with contextlib.suppress(OSError):  # all is on the disk: to take an interpreter with torch and LLVM apart costs 0.7 s
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class Stop(KeyboardInterrupt):
    """Another signal than Ctrl-C's: everything cleans up as after that, and the exit code is 128 + ``number``."""

    number = signal.SIGINT


def _interrupt(number: int, frame: object) -> None:
    Stop.number = signal.Signals(number)
    raise Stop


def invoke(arguments: list[str]) -> int:
    """Run one command line and return its exit code; a user's mistake prints one line, ``--traceback`` prints all."""
    try:
        code = cli.main(arguments, prog_name="paft", standalone_mode=False, obj=arguments)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except PaftError as error:
        return _fail(error.message, error.hint, error.exit_code, arguments)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "paft"
        return _fail(error.format_message(), f"{command} --help", 2, arguments)
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt) as stop:
        kept = {"run": "the same command with --resume keeps the finished stages",
                "compare": "the same command keeps the finished stages"}
        hint = kept.get(arguments[0]) if arguments else None
        told = getattr(stop.__cause__ or stop, "args", ())  # click wraps the interrupt
        message, hint = told if len(told) == 2 else ("interrupted; nothing half-made was kept", hint)
        return _fail(message, hint, 128 + Stop.number, arguments)
    except BrokenPipeError:
        return 0
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(f"out of memory: {error}".rstrip(": "), SMALLER, 5, arguments)
        if isinstance(error, OSError) and error.strerror is not None:  # a failed read or write of an open file has no name
            missing = isinstance(error, PermissionError | FileNotFoundError | IsADirectoryError | NotADirectoryError)
            code = 4 if missing else 3 if isinstance(error, FileExistsError) else 5
            return _fail(f"{error.filename or 'reading or writing'}: {error.strerror.lower()}", None, code, arguments)
        if "LOCAL_RANK" in os.environ and "by peer" in str(error):  # gloo's; the other one says why
            return _fail("another process of this training has ended", None, 1, arguments)
        return _fail(f"{type(error).__name__}: {error}".split("\n")[0],
                     "this is a bug in paft; please report it with the output of --traceback", 1, arguments)


def _fail(message: str, hint: str | None, code: int, arguments: list[str]) -> int:
    if os.environ.get("RANK", "0") != "0" and _told_by_the_first(code):
        return code
    if "--traceback" in arguments:
        traceback.print_exc()
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)  # whatever bar stands there
    message = one_line(message)
    click.echo(f"error: {message}" + (f"\n  try: {hint}" if hint else ""), err=True)
    return code


def _told_by_the_first(code: int) -> bool:
    """In a process that follows: what ends all of them is said once, by the first; its launcher ends this one meanwhile."""
    try:
        time.sleep(0 if code >= 128 else 5)
    except KeyboardInterrupt:
        return True
    return code >= 128
