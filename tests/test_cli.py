from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import gradiometer as gm
from gradiometer import cli
from gradiometer.protos.run_pb2 import Layer
from gradiometer.server.remote import RemoteStore
from gradiometer.server.settings import Settings
from gradiometer.server.store import EmbeddedStore
from gradiometer.stats_core.errors import PeerFault, WireError
from gradiometer.stats_core.summary import Summary
from tests.server.batches import make_run
from tests.server_process import eventually, running_server


def said(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_stored_runs_are_listed_and_reported_from_a_server_and_from_its_directory(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server:
        with gm.Publisher("tiny", server.grpc, params=[Layer(name="w", num_params=4)]) as publisher:
            for step in range(5):
                columns = {
                    "count": np.array([8.0]),
                    "batch_variance": np.array([0.25]),
                    "grad_sq_norm": np.array([1.0]),
                }
                publisher.record(step, Summary(8, columns), loss=2.0)
        with RemoteStore(server.grpc) as store:
            eventually(lambda: [s.stored_steps for s in store.list_runs()] == [5])
        asked = ("--endpoint", server.grpc)
        listed = said("runs", *asked)
        assert "tiny" in listed
        assert "5" in listed
        assert "5 measured, 0 to 4" in said("report", "tiny", *asked)
        with RemoteStore(server.grpc) as store, pytest.raises(PeerFault, match="tiny"):
            list(store.read("tinny"))
    kept = ("--data", str(tmp_path / "data"))
    assert said("runs", *kept) == listed
    assert "SNR 4" in said("report", *kept)


def test_a_directory_without_runs_says_how_to_get_one(tmp_path: Path) -> None:
    with running_server(tmp_path / "data"):
        pass
    for command in ("runs", "report"):
        assert "gm.attach(model, optimizer)" in said(command, "--data", str(tmp_path / "data"))


def test_a_narrow_terminal_folds_the_names_of_runs_and_cuts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "resnet50-imagenet-" * 5 + "end"
    with EmbeddedStore(Settings(data=tmp_path)) as store:
        store.register(make_run(name)).result(30)
    monkeypatch.setenv("COLUMNS", "80")
    lines = said("runs", "--data", str(tmp_path)).splitlines()
    assert lines[0].split() == ["run", "framework", "layers", "measured", "steps", "last", "step"]
    assert max(map(len, lines)) <= 80
    assert "".join(line.split()[0] for line in lines[1:]) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs", "--data", "nowhere"), "needs a data directory"),
        (("runs", "--data", __file__), "needs a data directory that it can read"),
        (("runs", "--endpoint", "127.0.0.1:1"), "start one with `gradiometer serve`"),
        (("serve", "--grpc", "nowhere"), "needs HOST:PORT, got grpc='nowhere'"),
        (("serve", "--http", "0.0.0.0:0"), "--allow-remote"),
    ],
)
def test_what_goes_wrong_is_one_line_and_no_traceback(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["gradiometer", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_the_version_is_the_packages() -> None:
    assert said("--version").strip() == f"gradiometer {gm.__version__}"


def test_a_store_that_went_away_is_a_wire_error(tmp_path: Path) -> None:
    with running_server(tmp_path / "data") as server:
        store = RemoteStore(server.grpc, timeout=2)
        assert store.list_runs() == []
    with store, pytest.raises(WireError, match="needs a server, got none"):
        store.list_runs()
