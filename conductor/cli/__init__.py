"""The console script `conductor`: from `migrate` and `worker` to `jobs` and `check`.

Thin: settings in, one action called, its result printed. A failure that has a name is one line
``error: …`` and one line ``hint: …`` on standard error and an exit code that says of which kind;
anything else is a bug (70) and shows its traceback. What a command needs is imported when it runs,
so that ``--help`` is fast.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, TypeVar

import typer

from conductor import errors
from conductor.errors import ConductorError

if TYPE_CHECKING:
    from conductor.config import Settings

T = TypeVar("T")

EXIT_DIFFERENT: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 69
EXIT_BUG: Final = 70
EXIT_CONFIG: Final = 78

_EXIT_CODES: Final[tuple[tuple[type[ConductorError], int], ...]] = (
    (errors.DatabaseUnavailable, EXIT_UNAVAILABLE),
    (errors.CaptureTimeout, EXIT_UNAVAILABLE),
    (errors.UnknownTask, EXIT_USAGE),
    (errors.UnknownEvent, EXIT_USAGE),
    (errors.PayloadInvalid, EXIT_USAGE),
    (errors.OptionInvalid, EXIT_USAGE),
    (errors.UnknownSchema, EXIT_USAGE),
)

app = typer.Typer(
    name="conductor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
jobs = typer.Typer(name="jobs", help="Look at jobs, cancel them, run them again.")
app.add_typer(jobs, no_args_is_help=True)
lanes = typer.Typer(
    name="lanes", help="Look at lanes that a failed job has halted; let them go on."
)
app.add_typer(lanes, no_args_is_help=True)
generate = typer.Typer(name="gen", help="Write code from the database.")
generate_types = typer.Typer(name="types", help="Row models of tables.")
app.add_typer(generate, no_args_is_help=True)
generate.add_typer(generate_types, no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Payload = Annotated[str, typer.Argument(help="JSON.")]
App = Annotated[
    str | None,
    typer.Option(
        "--app", help="MODULE:conductor whose definitions check the payload.", show_default=False
    ),
]


def main() -> None:
    """Run the command line; never returns."""
    try:
        app()
    except ConductorError as error:
        _fail(error)
    except Exception:  # noqa: BLE001 - whatever has no name is a bug
        _fail_as_bug()


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - lazy

        typer.echo(f"pgconductor {version('pgconductor')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Run and look after durable jobs in PostgreSQL."""


@app.command()
def migrate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the SQL, run nothing.")] = False,
) -> None:
    """Bring schema conductor of the database to what this version needs."""
    from conductor.cli import actions  # noqa: PLC0415 - lazy

    if dry_run:
        for migration in actions.pending(_settings()):
            typer.echo(f"-- {migration}\n{migration.statements.decode()}")
        return
    applied = actions.migrate(_settings())
    for migration in applied:
        typer.echo(f"applied {migration}")
    if not applied:
        typer.echo("nothing to do")


@app.command()
def worker(
    orchestrator: Annotated[str, typer.Argument(help="MODULE:orchestrator, or MODULE:conductor.")],
    metrics_port: Annotated[
        int | None, typer.Option(help="CONDUCTOR_METRICS_PORT", show_default=False)
    ] = None,
    slots: Annotated[int | None, typer.Option(help="CONDUCTOR_SLOTS", show_default=False)] = None,
) -> None:
    """Run an application's jobs until SIGTERM or SIGINT."""
    from conductor import logs  # noqa: PLC0415 - lazy
    from conductor.cli import actions  # noqa: PLC0415 - lazy

    settings = _settings(metrics_port=metrics_port, slots=slots)
    logs.configure(settings.log_level, settings.log_format)
    _run(lambda: actions.run_worker(orchestrator, settings))


@app.command()
def invoke(
    task: str,
    payload: Payload = "null",
    run_at: Annotated[str | None, typer.Option(help="Not before, with its zone.")] = None,
    priority: Annotated[int, typer.Option(help="Higher runs first.")] = 0,
    key: Annotated[str | None, typer.Option(help="Carried along with the job.")] = None,
    dedupe_key: Annotated[str | None, typer.Option(help="Only one job while it is taken.")] = None,
    app_path: App = None,
    as_json: AsJson = False,
) -> None:
    """Enqueue one run of a task and print the job's id."""
    from conductor.cli import actions  # noqa: PLC0415 - lazy

    options = {
        "run_at": actions.parse_instant(run_at),
        "priority": priority,
        "key": key,
        "dedupe_key": dedupe_key,
    }
    job = _run(lambda: actions.invoke(_settings(), task, payload, app=app_path, **options))
    _print({"id": job, "status": "dropped" if job is None else "enqueued"}, as_json=as_json)


@app.command()
def emit(event: str, payload: Payload = "null", app_path: App = None) -> None:
    """Emit an event: every task subscribed to it gets a job."""
    from conductor.cli import actions  # noqa: PLC0415 - lazy

    _run(lambda: actions.emit(_settings(), event, payload, app=app_path))
    typer.echo("emitted")


@app.command()
def top(
    interval: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show queues, tasks, workers and sidecars, live until Ctrl-C; once where there is no terminal.

    Counts are bounded, so that watching costs the queue nothing: >1000 is that many or more.
    """
    from conductor.cli import actions, output, screen  # noqa: PLC0415 - lazy

    settings = _settings()
    if as_json:
        output.print_json(_run(lambda: actions.read_top(settings)))
    elif once or not sys.stdout.isatty():
        screen.show(_run(lambda: actions.read_top(settings)))
    else:
        with suppress(KeyboardInterrupt):
            _run(lambda: screen.watch(lambda: actions.read_top(settings), interval))


@app.command()
def schedules(
    task: Annotated[str | None, typer.Option(help="Only of this task.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 200,
    as_json: AsJson = False,
) -> None:
    """List schedules, the next first: of triggers, and made at run time."""
    from conductor.cli import actions, output  # noqa: PLC0415 - lazy

    rows = _run(lambda: actions.list_schedules(_settings(), task, limit))
    output.print_json(rows) if as_json else output.print_schedules(rows)


@jobs.command("list")
def list_jobs(
    queue: Annotated[str | None, typer.Option(help="Only of this queue.")] = None,
    task: Annotated[str | None, typer.Option(help="Only of this task.")] = None,
    state: Annotated[str | None, typer.Option(help="ready, running, failed, …")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first: alive ones and what history keeps."""
    from conductor.cli import actions, output  # noqa: PLC0415 - lazy

    rows = _run(
        lambda: actions.list_jobs(_settings(), queue=queue, task=task, state=state, limit=limit)
    )
    output.print_json(rows) if as_json else output.print_jobs(rows)


@jobs.command("show")
def show_job(job: int, as_json: AsJson = False) -> None:
    """Show everything about a job: payload, result, error, steps."""
    from conductor.cli import actions, output  # noqa: PLC0415 - lazy

    row = _run(lambda: actions.show_job(_settings(), job))
    output.print_json(row) if as_json else output.print_job(row)


@jobs.command("retry")
def retry_job(job: int, as_json: AsJson = False) -> None:
    """Run a failed or cancelled job again, as a new job, and print that job's id."""
    from conductor.cli import actions  # noqa: PLC0415 - lazy

    new = _run(lambda: actions.retry_job(_settings(), job))
    _print({"id": new, "status": "enqueued", "retry_of": job}, as_json=as_json)


@jobs.command("cancel")
def cancel_job(
    job: int, reason: Annotated[str | None, typer.Option(help="Kept with the job.")] = None
) -> None:
    """Cancel a job; one that runs is told within a second."""
    from conductor.cli import actions  # noqa: PLC0415 - lazy

    _run(lambda: actions.cancel_job(_settings(), job, reason))
    typer.echo(f"cancelled {job}")


@lanes.command("list")
def list_lanes(
    task: Annotated[str | None, typer.Option(help="Of one task.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    as_json: AsJson = False,
) -> None:
    """List the lanes that are halted, with the job that has failed and how many wait behind it.

    `conductor jobs retry` of that job runs it again where it stood.
    """
    from conductor.cli import actions, output  # noqa: PLC0415 - lazy

    rows = _run(lambda: actions.list_lanes(_settings(), task=task, limit=limit))
    output.print_json(rows) if as_json else output.print_lanes(rows)


@lanes.command("resume")
def resume_lane(task: str, key: str) -> None:
    """Let a halted lane go on without the job that has failed."""
    from conductor.cli import actions  # noqa: PLC0415 - lazy

    _run(lambda: actions.resume_lane(_settings(), task, key))
    typer.echo(f"resumed {task} {key}")


@app.command()
def check(
    conductor: Annotated[str, typer.Argument(help="MODULE:conductor.")],
    db_url: Annotated[
        str | None,
        typer.Option("--db-url", help="Where the tables are, if elsewhere.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare models and triggers with the live catalog, and the queue's schema with this version.

    Prints one line for each difference, with what would end it, and exits with 1 if there are any.
    With --db-url only that database's tables are looked at, not the queue's schema.
    """
    from conductor.cli import actions  # noqa: PLC0415 - lazy

    found = _run(lambda: actions.check(_settings(), conductor, db_url))
    if as_json:
        from conductor.cli import output  # noqa: PLC0415 - lazy

        output.print_json([finding.to_json() for finding in found])
    else:
        for finding in found:
            typer.echo(_line(str(finding)))
        count = f"{len(found)} difference{'s' if len(found) > 1 else ''}"
        typer.echo(count if found else "no differences", err=True)
    if found:
        raise typer.Exit(EXIT_DIFFERENT)


@generate_types.command("python")
def generate_python(
    schemas: Annotated[str, typer.Option(help="Names, with commas between them.")] = "public",
    db_url: Annotated[
        str | None, typer.Option("--db-url", help="CONDUCTOR_DSN", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file instead of standard output.")
    ] = None,
) -> None:
    """Print a module with a row model for each table of some schemas.

    The same database gives the same text.
    """
    from conductor.cli import actions  # noqa: PLC0415 - lazy

    names = [name for part in schemas.split(",") if (name := part.strip())]
    if not names:
        raise typer.BadParameter("no schema is named", param_hint="--schemas")
    settings = _settings(dsn=db_url)
    source = _run(lambda: actions.generate_models(settings, names)).encode()
    if output is None:
        sys.stdout.buffer.write(source)
        return
    try:
        output.write_bytes(source)
    except OSError as error:
        raise errors.ConfigError(
            f"cannot write {output}: {error.strerror}", hint="Name another --output."
        ) from None


# --- what the commands share ------------------------------------------------------------------


def _settings(**options: Any) -> Settings:
    from conductor.config import load  # noqa: PLC0415 - lazy

    return load(**options)


def _run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run on uvloop where it is installed."""
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] | None
    try:
        from uvloop import new_event_loop  # noqa: PLC0415 - optional
    except ImportError:
        new_event_loop = None
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work())


def _print(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        from conductor.cli import output  # noqa: PLC0415 - lazy

        output.print_json(result)
    else:
        typer.echo(result["id"] if result["id"] is not None else result["status"])


def _fail(error: ConductorError) -> NoReturn:
    typer.echo(f"error: {_line(str(error))}", err=True)
    typer.echo(f"hint: {_line(error.hint)}", err=True)
    for kind, code in _EXIT_CODES:
        if isinstance(error, kind):
            sys.exit(code)
    sys.exit(EXIT_CONFIG)


def _fail_as_bug() -> NoReturn:
    import traceback  # noqa: PLC0415 - lazy

    traceback.print_exc()
    typer.echo(f"error: {_line(repr(sys.exc_info()[1]))}", err=True)
    typer.echo("hint: This is a bug, in the application or in pgconductor: see above.", err=True)
    sys.exit(EXIT_BUG)


def _line(text: str) -> str:
    from conductor.texts import printable  # noqa: PLC0415 - lazy

    return printable(" ".join(text.split()))
