"""The command line: its commands, its errors and exit codes.

Commands parse, call and print. They import what they call inside, so that ``duel --help`` answers at once.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import NoReturn

import click

from toolkit.cli import check, folders, judging, measure, reward_models, run, study
from toolkit.cli.options import JSON_HELP, Group, common, quiet_libraries
from toolkit.errors import EXIT_CODE_FILE, LAUNCHER_FILE, DuelError, Terminated, shown

# What libraries say of a full disk in errors of their own: the system, torch's writer of checkpoints (twice), SQLite.
FULL_DISK = ("No space left on device", "inline_container.cc", "PytorchStreamWriter failed", "disk is full")
USER_ERROR, DEFECT, INTERRUPTED, TERMINATED = 2, 1, 130, 143


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("-q", "--quiet", is_flag=True, help="Show results and errors, but no progress.")
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
@click.version_option(package_name="rlhf-duel", prog_name="duel")
@click.pass_context
def cli(ctx: click.Context, debug: bool, quiet: bool, as_json: bool) -> None:
    """DPO, or a reward model and PPO? Both arms on your preference data, one evaluation, one verdict.

    The options -q, --debug and --json can stand before or after a command.
    """
    quiet_libraries()  # before any of them is imported
    ctx.obj = {"debug": debug, "quiet": quiet, "json": as_json}


for command in (
    *run.COMMANDS,
    *measure.COMMANDS,
    *judging.COMMANDS,
    *check.COMMANDS,
    *reward_models.COMMANDS,
    *study.COMMANDS,
    *folders.COMMANDS,
):
    cli.add_command(common(command))


def main() -> NoReturn:
    """The console script: errors become one message and an exit code (0 done, 2 input, 1 defect, 130 Ctrl-C, 143
    SIGTERM)."""
    signal.signal(signal.SIGTERM, _terminate)
    hook, sys.unraisablehook = sys.unraisablehook, _deliver_again
    try:
        code = exit_code()
    finally:
        sys.unraisablehook = hook
    if code == USER_ERROR and (file := os.environ.get(EXIT_CODE_FILE)):
        from toolkit.files import write_text

        write_text(Path(file), str(code))  # the launcher of several processes would make a 1 of it
    sys.exit(code)


def own_words() -> list[str]:
    """The words of the command line, without those behind ``--``."""
    words = sys.argv[1:]
    return words[: words.index("--")] if "--" in words else words


def exit_code() -> int:
    """Run the command; show an error as a message."""
    debug = "--debug" in own_words()
    try:
        cli.main(standalone_mode=False)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        return _interruption(error)
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        print(shown(usage.getvalue()), end="", file=sys.stderr)
        return USER_ERROR
    except DuelError as error:
        _show_traceback(debug)
        print(f"error: {error.render()}", file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        if _stems_from(error, KeyboardInterrupt):
            return _interruption(error)
        if _launcher_has_ended():
            return TERMINATED
        _show_traceback(debug)
        if (message := _system_message(error)) is not None:
            print(shown(message), file=sys.stderr)
            return USER_ERROR
        print(
            shown(f"internal error: {type(error).__name__}: {error}"),
            "\n  This is a defect of duel. Please report it with the output of `duel env` and of the same command "
            "under `duel --debug`.",
            sep="",
            file=sys.stderr,
        )
        return DEFECT


def _terminate(signal_number: int, frame: object) -> NoReturn:
    """The handler of SIGTERM. A second one ends the process at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


def _deliver_again(ignored: sys.UnraisableHookArgs) -> None:
    """Of Ctrl-C or SIGTERM in a destructor: Python ignores what ``__del__`` raises, and the command would go on.

    The signal comes again a moment later, when the destructor has returned.
    """
    if not isinstance(ignored.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)
        return
    number = signal.SIGINT
    if isinstance(ignored.exc_value, Terminated):
        number = signal.SIGTERM
        signal.signal(signal.SIGTERM, _terminate)
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    again = threading.Timer(0.01, signal.pthread_kill, [main_thread, number])
    again.daemon = True
    again.start()


def _interruption(error: BaseException) -> int:
    terminated = _stems_from(error, Terminated)
    word = "terminated" if terminated else "interrupted"
    again = "run the same command again to continue"
    command = next((word for word in own_words() if not word.startswith("-")), "")
    if command == "run" and "--force" in own_words():  # it would run finished stages again
        again = "run the same command without --force to continue"
    print(f"\n{word}; {again}", file=sys.stderr)
    return TERMINATED if terminated else INTERRUPTED


def _launcher_has_ended() -> bool:
    """Whether this process shared the work of a command that has ended: then the error is that the others are gone."""
    from toolkit.files import is_locked

    return bool(file := os.environ.get(LAUNCHER_FILE)) and not is_locked(Path(str(file)))


def _stems_from(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether such an exception is behind an error: Ctrl-C in the middle of an import becomes another error."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def _system_message(error: BaseException | None) -> str | None:
    """What a person can do about a full disk, a missing permission or a long name; None for any other error.

    Some writers wrap the system's error in one of their own, so the causes and the texts count, too.
    """
    while error is not None:
        text = str(error)
        number = error.errno if isinstance(error, OSError) else None
        where = getattr(error, "filename", None) or os.getcwd()
        if number in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in FULL_DISK):
            full = getattr(error, "filename", None) or _fullest_disk()
            return f"error: the disk is full\n  where: {full}\n  fix:   free space, then run the same command"
        if number == errno.EFBIG or "File too large" in text:
            return f"error: the disk takes no file this large\n  where: {where}\n  fix:   raise the limit (ulimit -f)"
        if number == errno.ENAMETOOLONG:
            return f"error: {os.strerror(number)}\n  where: {where}\n  fix:   choose a shorter name"
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            return f"error: {os.strerror(number)}\n  where: {where}\n  fix:   choose a folder you can write"
        error = error.__cause__ or error.__context__
    return None


def _fullest_disk() -> str:
    """The folder of this command with the least space: an error of a library often does not name its file."""
    from toolkit.models.resolve import cache_folder

    words = sys.argv[1:]
    named = [Path(value) for word, value in zip(words, words[1:], strict=False) if word == "--out"]
    places = [*named, Path("runs"), cache_folder(), Path(tempfile.gettempdir()), Path.cwd()]
    there = [
        next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir()) for path in places
    ]
    fullest = min(there, key=lambda folder: shutil.disk_usage(folder).free)
    return f"{fullest} ({shutil.disk_usage(fullest).free / 2**20:,.1f} MiB free)"


def _show_traceback(debug: bool) -> None:
    if debug:
        print(shown(traceback.format_exc()), file=sys.stderr)
