"""The command ``gradiometer``."""

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"gradiometer needs {missing.name} for its command line, got none; pip install 'gradiometer[server]'"
    ) from missing

from gradiometer import __version__
from gradiometer.stats_core.errors import GradiometerError

__all__ = ["app", "main"]

app = typer.Typer(
    name="gradiometer",
    help="An instrument for the gradients of a training job: per-example gradient statistics, live, layer by layer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

_Data = Annotated[Path, typer.Option("--data", metavar="DIR", help="The server's data directory.", show_default=True)]
_Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint", metavar="HOST:PORT", help="A running server, asked in place of the directory."),
]
_DATA = Path("gradiometer-data")
_NO_RUNS = "no runs yet; attach a training job with gm.attach(model, optimizer), or try `gradiometer demo`"


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer's callback
    if wanted:
        typer.echo(f"gradiometer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command()
def serve(
    grpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where training jobs connect. Default 127.0.0.1:50051.")
    ] = None,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The live page and /metrics. Default 127.0.0.1:9464.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Data directory. Default ./gradiometer-data.")
    ] = None,
    allow_remote: Annotated[
        bool | None,
        typer.Option("--allow-remote", help="Take connections from other machines, unencrypted and unauthenticated."),
    ] = None,
) -> None:
    """Run the statistics server: takes measurements in, keeps them, shows them.

    Settings come from these flags, then GRADIOMETER_* in the environment, then gradiometer.toml, then the defaults.
    """
    from gradiometer.server.app import run
    from gradiometer.server.settings import Settings

    run(Settings.load(grpc=grpc, http=http, data=data, allow_remote=allow_remote))


@app.command()
def demo(
    data: _Data = _DATA,
    torch_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the PyTorch job.")] = 300,
    jax_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the JAX job.")] = 2000,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server up afterwards, until Ctrl-C.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines for a log in place of a live picture.")] = False,
) -> None:
    """Watch the whole product work: two real training jobs, PyTorch and JAX, and a server. About two minutes."""
    from gradiometer.demo.play import play

    console = Console()
    play(
        data,
        torch_steps=torch_steps,
        jax_steps=jax_steps,
        plain=plain or not console.is_terminal,
        keep=keep,
        console=console,
    )


@app.command()
def runs(data: _Data = _DATA, endpoint: _Endpoint = None) -> None:
    """List the runs that are stored."""
    with _reader(data, endpoint) as reader:
        found = reader.list_runs()
    if not found:
        typer.echo(_NO_RUNS)
        return
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("run", "framework", "layers", "measured", "steps", "last step"):
        numeric = heading in ("layers", "steps", "last step")
        is_name = heading == "run"  # on a narrow terminal it alone gives way, and onto further lines
        table.add_column(
            heading,
            justify="right" if numeric else "left",
            no_wrap=not is_name,
            overflow="fold",
            min_width=None if is_name else len(heading),
        )
    for status in found:
        spec = status.run
        share = spec.coverage.num_params_measured / spec.coverage.num_params if spec.coverage.num_params else None
        table.add_row(
            spec.run_id,
            spec.world.framework or "–",
            str(len(spec.layers)),
            "–" if share is None else f"{share:.1%}",
            f"{status.stored_steps:,}",
            f"{status.last_step:,}",
        )
    Console().print(table)


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(help="The run; all runs if left out.")] = None,
    data: _Data = _DATA,
    endpoint: _Endpoint = None,
    window: Annotated[int, typer.Option(min=1, help="Steps that the table of layers speaks of.")] = 64,
) -> None:
    """A short report of a run: its layers, and what the numbers mean."""
    from gradiometer.server.report import report as read
    from gradiometer.server.report_text import render

    console = Console()
    with _reader(data, endpoint) as reader:
        found = read(reader, run, window=window)
    if not found:
        typer.echo(_NO_RUNS)
    for one in found:
        console.print(render(one, window=window))


def _reader(data: Path, endpoint: str | None):  # type: ignore[no-untyped-def]
    """A running server, or the data directory itself."""
    if endpoint is not None:
        from gradiometer.server.remote import RemoteStore

        return RemoteStore(endpoint)
    from gradiometer.server.store import open_readonly

    return open_readonly(data)


def main() -> None:
    """Run the command; what goes wrong on purpose is one line, not a traceback."""
    try:
        app()
    except GradiometerError as error:
        typer.secho(f"gradiometer: {error}", err=True, fg="red")
        sys.exit(2)
    except ValueError as error:
        typer.secho(f"gradiometer: {error}", err=True, fg="red")
        sys.exit(2)


if __name__ == "__main__":
    main()
