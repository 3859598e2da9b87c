"""`rsi` and `python -m rsi_jobs.controller`: turn a command line into a call, and errors into exit codes.

0        done, or nothing to do
1        a defect of ours, with a traceback
64-78    see errors.py: one sentence on stderr; a usage error is 64
130      Ctrl-C, SIGTERM or a cancelled run: the same command goes on
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence

import typer

from rsi_jobs.commands import compare, keep, lineage, look, run, system, watch
from rsi_jobs.errors import Cancelled, RsiError, UserError

# What typer raises for a wrong command line, wherever its parser lives in this version.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="rsi",
    help="Recursive self-improvement of text-to-image diffusion models.",
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    run.run, watch.status, watch.logs, run.cancel, run.resume, look.show, look.path, look.report,
    compare.compare, lineage.lineage, keep.export, keep.prune, system.doctor, system.mlflow,
):  # fmt: skip
    app.command(_command.__name__)(_command)


@app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """`rsi`: run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _guarded(arguments, "rsi", f"rsi {shlex.join(arguments)}")


def controller_main(argv: Sequence[str] | None = None) -> int:
    """`python -m rsi_jobs.controller`: the same as `rsi run`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    again = f"python -m rsi_jobs.controller {shlex.join(arguments)}"
    return _guarded(["run", *arguments], "rsi", again)


def _guarded(arguments: list[str], program: str, again: str) -> int:
    try:
        return _invoke(arguments, program)
    except (KeyboardInterrupt, typer.Abort):
        _say(f"stopped; `{again.strip()}` goes on where it was")
        return Cancelled.exit_code
    except RsiError as error:
        _say(str(error))
        return error.exit_code
    except _UsageError as error:
        _say(f"{error.format_message()}")  # type: ignore[attr-defined]
        return UserError.exit_code
    except BrokenPipeError:  # `rsi ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # noqa: BLE001 - the last line of defence: a defect of ours, whatever it is
        traceback.print_exc()
        return 1


def _invoke(arguments: list[str], program: str) -> int:
    command = typer.main.get_command(app)
    code = command.main(args=arguments, prog_name=program, standalone_mode=False)
    if code == Cancelled.exit_code:
        raise KeyboardInterrupt  # typer turns Ctrl-C into this code
    return int(code or 0)


def _say(sentence: str) -> None:
    """An error as one line, whatever a message quotes."""
    print("error: " + " ".join(sentence.split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
