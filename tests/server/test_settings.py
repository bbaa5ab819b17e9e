"""Settings: where they come from, which win, and what is refused."""

from pathlib import Path

import pytest

from gradiometer.server.settings import Address, Settings


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_closed_to_other_machines() -> None:
    settings = Settings.load()
    assert (settings.grpc, settings.http, settings.data) == (
        "127.0.0.1:50051",
        "127.0.0.1:9464",
        Path("gradiometer-data"),
    )
    assert settings.check_reach() == []


def test_flags_win_over_the_environment_over_the_file_over_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("gradiometer.toml").write_text('grpc = "127.0.0.1:1"\nhttp = "127.0.0.1:1"\nwindow_steps = 7\n')
    monkeypatch.setenv("GRADIOMETER_GRPC", "127.0.0.1:2")
    monkeypatch.setenv("GRADIOMETER_HTTP", "127.0.0.1:2")
    settings = Settings.load(grpc="127.0.0.1:3", http=None)
    assert (settings.grpc, settings.http, settings.window_steps, settings.replay_runs) == (
        "127.0.0.1:3",
        "127.0.0.1:2",
        7,
        16,
    )


def test_what_the_environment_says_to_training_jobs_is_not_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIOMETER_ENDPOINT", "127.0.0.1:50051")
    assert Settings.load().grpc == "127.0.0.1:50051"


@pytest.mark.parametrize("text", ["", "localhost", ":50051", "localhost:", "localhost:65536", "http://a:1", "::1:5"])
def test_a_malformed_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"serve needs HOST:PORT, got http='.*'; write for example '127.0.0.1:50051'$"):
        Settings.load(http=text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback_is_recognised(host: str) -> None:
    assert Address(host, 1).is_loopback
    assert Address.parse(str(Address(host, 1))) == Address(host, 1)


@pytest.mark.parametrize("text", ["0.0.0.0:50051", "[::]:50051", "example.org:50051", "10.0.0.1:1"])
def test_an_address_that_others_can_reach_needs_a_flag_and_earns_a_warning(text: str) -> None:
    with pytest.raises(ValueError, match=r"serve needs a loopback address, got grpc=.*--allow-remote"):
        Settings.load(grpc=text).check_reach()
    (warning,) = Settings.load(grpc=text, allow_remote=True).check_reach()
    assert "unencrypted" in warning


def test_an_unknown_setting_is_refused_with_those_there_are() -> None:
    Path("gradiometer.toml").write_text("grcp = 1\n")
    with pytest.raises(ValueError, match=r"serve needs settings in \('grpc', .*got grcp=1; remove or rename it$"):
        Settings.load()


def test_a_value_of_the_wrong_type_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^serve needs window_steps .*, got window_steps='many'; correct it$"):
        Settings.load(window_steps="many")
    with pytest.raises(ValueError, match="got window_steps=0"):
        Settings.load(window_steps=0)


def test_a_file_that_is_no_toml_is_refused() -> None:
    Path("gradiometer.toml").write_text("grpc = \n")
    with pytest.raises(ValueError, match=r"serve needs a TOML file, got gradiometer.toml: .*line 1"):
        Settings.load()
