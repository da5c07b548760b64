"""The console script `cdc`: run, check, plan, apply, status, record, decode; dead, slot.

Thin: settings in, one function of the package called, its result printed. A failure that has a name
is one line `error: …` and one line `hint: …` on standard error, and the exit code of its class;
anything else is a bug (70) and shows its traceback. Imports are lazy, so that `--help` is fast.
"""

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TextIO, TypeVar

import typer

from cdc.errors import CdcError, ConfigError

if TYPE_CHECKING:
    from cdc.config import Settings
    from cdc.letters import Outcome
    from cdc.reconciliation import Proposal

T = TypeVar("T")
_EXIT_REFUSED: Final = 65
_EXIT_BUG: Final = 70
_PIPE_WIDTH: Final = 200

app = typer.Typer(
    name="cdc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

dead = typer.Typer(
    help="Changes that could not become a job: list, show, redrive, discard.", no_args_is_help=True
)
app.add_typer(dead, name="dead")
slots = typer.Typer(help="Replication slots: list, drop, skip.", no_args_is_help=True)
app.add_typer(slots, name="slot")

Slot = Annotated[str | None, typer.Option("--slot", help="CDC_SLOT", show_default=False)]
Publication = Annotated[
    str | None, typer.Option("--publication", help="CDC_PUBLICATION", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SlotName = Annotated[str, typer.Argument(metavar="SLOT", help="Its name.")]
LetterIds = Annotated[
    list[int] | None,
    typer.Argument(metavar="ID...", help="Of `cdc dead list`.", show_default=False),
]


def main() -> None:
    """Run the command line; never returns."""
    try:
        app()
    except CdcError as error:
        _fail(error)
    except Exception:  # noqa: BLE001  # whatever has no name is a bug
        _fail_as_bug()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pgconductor {_version()}")
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
    """Stream committed changes of a PostgreSQL database into a durable job queue."""


@app.command()
def run(slot: Slot = None, publication: Publication = None) -> None:
    """Lead or stand by until SIGTERM."""
    from cdc import logs  # noqa: PLC0415  # lazy
    from cdc.metrics import Metrics  # noqa: PLC0415  # lazy
    from cdc.service import Service  # noqa: PLC0415  # lazy
    from conductor.tracing import export  # noqa: PLC0415  # lazy

    settings = _settings(slot=slot, publication=publication)
    logs.configure(settings.log_level, settings.log_format)
    export("cdc")

    # Rows leave no cycles behind: looking for some took a tenth of the router's time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)

    async def serve() -> None:
        service = Service(settings, Metrics(_version(), settings.slot))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, service.stop)
        await service.run()

    _run(serve)


@app.command()
def check(slot: Slot = None, publication: Publication = None, as_json: AsJson = False) -> None:
    """Say what stands against `cdc run`, and how to mend it. Changes nothing."""
    from dataclasses import asdict  # noqa: PLC0415  # lazy

    from cdc.check import check as look  # noqa: PLC0415  # lazy
    from cdc.check import exit_code  # noqa: PLC0415  # lazy

    settings = _settings(slot=slot, publication=publication)
    findings = _run(lambda: look(settings))
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            fix = f" → {finding.fix}" if finding.fix else ""
            typer.echo(f"{_colour(finding.level)} {_printable(finding.message + fix)}")
    raise typer.Exit(exit_code(findings))


@app.command("plan")
def show_plan(slot: Slot = None, publication: Publication = None, as_json: AsJson = False) -> None:
    """Show what publication and slot lack, as SQL that a DBA can run. Changes nothing."""
    from cdc.reconciliation import Reconciliation  # noqa: PLC0415  # lazy

    settings = _settings(slot=slot, publication=publication)

    async def propose() -> "Proposal":
        async with Reconciliation.open(settings) as reconciliation:
            return await reconciliation.propose()

    proposal = _run(propose)
    if as_json:
        from dataclasses import asdict  # noqa: PLC0415  # lazy

        _print_json(asdict(proposal))
    else:
        _print_proposal(settings, proposal)


@app.command("apply")
def apply_plan(
    slot: Slot = None,
    publication: Publication = None,
    accept_gap: Annotated[
        bool, typer.Option("--accept-gap", help="Record as lost what was out of the publication.")
    ] = False,
) -> None:
    """Do what `cdc plan` shows: the publication with the rights of CDC_ADMIN_DSN, the slot."""
    from cdc.reconciliation import Reconciliation  # noqa: PLC0415  # lazy

    settings = _settings(slot=slot, publication=publication)

    async def apply() -> list[str]:
        async with Reconciliation.open(settings) as reconciliation:
            return await reconciliation.apply(accept_gap=accept_gap)

    for line in _run(apply) or ["nothing to do"]:
        typer.echo(line)


@app.command()
def status(slot: Slot = None, as_json: AsJson = False) -> None:
    """Show positions, lag, leader, slot, gaps and subscriptions."""
    from cdc.status import read_status  # noqa: PLC0415  # lazy

    settings = _settings(slot=slot)
    report = _run(lambda: read_status(settings))
    if as_json:
        _print_json(report)
    else:
        _print_status(report)


@app.command()
def record(
    file: Annotated[str, typer.Argument(help="Where to write; - for standard output.")],
    slot: Slot = None,
    publication: Publication = None,
    temporary: Annotated[
        bool, typer.Option("--temporary", help="Through a slot of its own, from now on.")
    ] = False,
    messages: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
) -> None:
    """Record the stream into FILE until Ctrl-C. Acknowledges nothing; FILE holds the rows' data."""
    from cdc.recorder import Recorder  # noqa: PLC0415  # lazy

    settings = _settings(slot=slot, publication=publication)

    async def to(output: TextIO) -> None:
        recorder = Recorder(settings, output, temporary=temporary, limit=messages)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, recorder.stop)
        await recorder.run()
        typer.echo(f"{recorder.messages} messages recorded", err=True)

    with _file(file, "w") as output:
        _run(lambda: to(output))


@app.command()
def decode(
    file: Annotated[str, typer.Argument(help="What `cdc record` wrote; - for standard input.")],
    as_json: AsJson = False,
) -> None:
    """Print a recording as typed changes, without a server."""
    from cdc.recording import read  # noqa: PLC0415  # lazy
    from cdc.replay import render, replay, summarise  # noqa: PLC0415  # lazy

    with _file(file, "r") as recording:
        header, entries = read(recording)
        if not as_json:
            typer.echo(f"# {header.plugin} slot {header.slot}, PostgreSQL {header.server_version}")
        for event in replay(header, entries):
            typer.echo(render(event) if as_json else summarise(event))


# --- dead letters -----------------------------------------------------------------------------


@dead.command("list")
def dead_list(
    slot: Slot = None,
    limit: Annotated[int, typer.Option(min=1, help="The oldest so many.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show the changes that were set aside, the oldest first."""
    from cdc.letters import list_letters  # noqa: PLC0415  # lazy

    settings = _settings(slot=slot)
    letters = _run(lambda: list_letters(settings, limit))
    if as_json:
        _print_json(letters)
    for letter in () if as_json else letters:
        facts = (letter["commit_lsn"], letter["task"] or "?", letter["table"] or "?")
        typer.echo(_printable(f"{letter['id']} {' '.join(facts)} {letter['error']}"))


@dead.command("show")
def dead_show(
    letter: Annotated[int, typer.Argument(metavar="ID", help="Of `cdc dead list`.")],
    slot: Slot = None,
) -> None:
    """Show one with its row, its table and its bytes, as JSON. It holds the row's data."""
    from cdc.letters import show_letter  # noqa: PLC0415  # lazy

    settings = _settings(slot=slot)
    _print_json(_run(lambda: show_letter(settings, letter)))


@dead.command("redrive")
def dead_redrive(
    letters: LetterIds = None,
    slot: Slot = None,
    everything: Annotated[bool, typer.Option("--all", help="Every one of the slot.")] = False,
    as_json: AsJson = False,
) -> None:
    """Route them again, by the code of today. Ends with status 65 when one of them stays."""
    from cdc.letters import redrive_letters  # noqa: PLC0415  # lazy

    if everything == bool(letters):
        raise typer.BadParameter("give either ID... or --all")
    settings = _settings(slot=slot)
    outcomes = _run(lambda: redrive_letters(settings, None if everything else letters))
    _print_outcomes(outcomes, as_json=as_json)


@dead.command("discard")
def dead_discard(
    letters: Annotated[list[int], typer.Argument(metavar="ID...", help="Of `cdc dead list`.")],
    slot: Slot = None,
    as_json: AsJson = False,
) -> None:
    """Give them up: their changes will never have a job."""
    from cdc.letters import discard_letters  # noqa: PLC0415  # lazy

    settings = _settings(slot=slot)
    _print_outcomes(_run(lambda: discard_letters(settings, letters)), as_json=as_json)


def _print_outcomes(outcomes: "list[Outcome]", *, as_json: bool) -> None:
    """Print what became of each letter; exit with 65 when one is not dealt with."""
    from dataclasses import asdict  # noqa: PLC0415  # lazy

    if as_json:
        _print_json([asdict(outcome) for outcome in outcomes])
    else:
        for outcome in outcomes:
            jobs = f" {outcome.jobs}" if outcome.jobs > 1 else ""
            why = f": {outcome.error}" if outcome.error else ""
            typer.echo(_printable(f"{outcome.id} {outcome.result}{jobs}{why}"))
    if any(outcome.result in {"kept", "missing"} for outcome in outcomes):
        raise typer.Exit(_EXIT_REFUSED)


# --- slots ------------------------------------------------------------------------------------


@slots.command("list")
def slot_list(as_json: AsJson = False) -> None:
    """Show the server's logical slots, and what stands against streaming from ours."""
    from cdc.slot_operations import list_slots  # noqa: PLC0415  # lazy

    settings = _settings()
    rows = _run(lambda: list_slots(settings))
    if as_json:
        _print_json(rows)
    for row in () if as_json else rows:
        level = "error" if row["problem"] else "ok"
        state = row["problem"] or ("fits its progress" if row["ours"] else "not ours")
        who = f", PID {row['active_pid']} streams" if row["active_pid"] else ""
        condition = f"{row['condition']}: " if row["condition"] else ""
        typer.echo(f"{_colour(level)} {row['slot']}: {_printable(f'{condition}{state}{who}')}")


@slots.command("drop")
def slot_drop(name: SlotName) -> None:
    """Take a slot and its progress out of service. What it has not routed yet is given up."""
    from cdc.slot_operations import drop_slot  # noqa: PLC0415  # lazy

    settings = _settings(slot=name)
    end = _run(lambda: drop_slot(settings, name))
    typer.echo(f"slot {name} is dropped; changes after {end} are not captured")


@slots.command("skip")
def slot_skip(
    name: SlotName,
    to: Annotated[str, typer.Option("--to", metavar="LSN", help="As the error names it.")],
) -> None:
    """Give up what the server cannot decode: go on at LSN, and record the gap."""
    from cdc.lsn import Lsn  # noqa: PLC0415  # lazy
    from cdc.slot_operations import skip_to  # noqa: PLC0415  # lazy

    try:
        position = Lsn.parse(to)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    settings = _settings(slot=name)
    stands = _run(lambda: skip_to(settings, name, position))
    typer.echo(f"slot {name} goes on at {stands}; what was committed before is given up")


# --- what the commands share ------------------------------------------------------------------


def _settings(**overrides: str | None) -> "Settings":
    from cdc.config import load  # noqa: PLC0415  # lazy

    return load(**overrides)


@contextmanager
def _file(path: str, mode: Literal["r", "w"]) -> Iterator[TextIO]:
    """Open a file, or take standard input or output for `-`."""
    if path == "-":
        yield sys.stdin if mode == "r" else sys.stdout
        return
    flags = os.O_RDONLY if mode == "r" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(path, flags, 0o600)  # rows are in it: for nobody else's eyes
        opened = os.fdopen(descriptor, mode, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot open {path}: {error.strerror}", hint="name another FILE"
        ) from None
    with opened as file:
        yield file


def _version() -> str:
    from importlib.metadata import version  # noqa: PLC0415  # lazy

    return version("pgconductor")


def _run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run on uvloop where it is installed."""
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] | None
    try:
        from uvloop import new_event_loop  # noqa: PLC0415  # optional
    except ImportError:
        new_event_loop = None
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def _colour(level: str) -> str:
    colours = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "error": typer.colors.RED}
    return typer.style(f"{level}:", fg=colours[level])


def _print_proposal(settings: "Settings", proposal: "Proposal") -> None:
    """Print a plan as a script: whatever is not SQL is a comment."""
    _comment(f"publication {settings.publication}")
    for statement in proposal.statements:
        typer.echo(f"{statement};")
    for drift in proposal.drift:
        _comment(f"drift: {drift}, and its changes were captured before: some are lost")
    for misfit in proposal.misfit:
        _comment(f"refused: {misfit}, and nothing is captured through it yet")
    for missing in proposal.missing:
        _comment(f"table_missing: {missing}")
    for task, why in proposal.refused.items():
        _comment(f"refused: task {task}: {why}")
    _comment(f"slot {settings.slot}")
    if proposal.problem:
        _comment(f"{proposal.condition or 'error'}: {proposal.problem}")
    if proposal.slot:
        _comment(f"{proposal.slot}: {proposal.slot_command}")
    if not (proposal.statements or proposal.slot or proposal.problem or proposal.missing):
        _comment("nothing to do")


def _comment(text: str) -> None:
    """Print a line that SQL ignores, whatever names are in it."""
    typer.echo(f"-- {_printable(' '.join(text.split()))}")


def _print_status(report: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415  # lazy
    from rich.filesize import decimal  # noqa: PLC0415  # lazy
    from rich.markup import escape  # noqa: PLC0415  # lazy
    from rich.table import Table  # noqa: PLC0415  # lazy

    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)
    facts = Table(show_header=False, box=None)
    for name, value in {**report, "leader": report["leader"] or "nobody"}.items():
        if not isinstance(value, list) and value is not None:
            size = f" ({decimal(value)})" if name.endswith("bytes") and value >= 1000 else ""
            facts.add_row(name.replace("_", " "), escape(_printable(f"{value}{size}")))
    console.print(facts)
    tables = ("subscriptions", "publication_drift", "publication_lacks", "sidecars", "gaps")
    for name in tables:
        rows, title = report[name], name.replace("_", " ")
        if not rows:
            console.print(f"no {title}")
            continue
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in rows[0]:
            table.add_column(column.replace("_", " "), overflow="fold")
        for row in rows:
            table.add_row(*(escape(_cell(value)) for value in row.values()))
        console.print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return _printable(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _printable(text: str) -> str:
    """Return a text for a terminal, without what would steer it: rows and names may be in it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _fail(error: CdcError) -> None:
    typer.echo(_printable(f"error: {error}"), err=True)
    typer.echo(_printable(f"hint: {error.hint}"), err=True)
    sys.exit(error.exit_code)


def _fail_as_bug() -> None:
    import traceback  # noqa: PLC0415  # lazy

    traceback.print_exc()
    typer.echo(f"error: {sys.exc_info()[1]!r}", err=True)
    typer.echo(f"hint: {CdcError.hint}", err=True)
    sys.exit(_EXIT_BUG)


if __name__ == "__main__":
    main()
