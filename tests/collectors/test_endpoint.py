import re
from pathlib import Path

import pytest

from gradiometer.collectors.endpoint import Credentials, Endpoint, is_disabled, resolve


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("localhost:1", Endpoint("localhost", 1)),
        ("10.0.0.7:65535", Endpoint("10.0.0.7", 65535)),
        ("stats-server.example:50051", Endpoint("stats-server.example", 50051)),
        ("[::1]:50051", Endpoint("::1", 50051)),
        ("off", None),
        ("OFF", None),
    ],
)
def test_an_endpoint_is_read_and_written_back(text: str, endpoint: Endpoint | None) -> None:
    assert resolve(text, {}) == endpoint
    if endpoint is not None:
        assert str(endpoint) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "localhost:",
        ":50051",
        "localhost:0",
        "localhost:65536",
        "localhost:x",
        "http://localhost:50051",
        "::1:50051",
        "[::1]",
        "a b:1",
        "localhost:50051/",
        "localhost:50051 ",
    ],
)
def test_a_malformed_endpoint_says_what_to_write(text: str) -> None:
    form = (
        rf"^Publisher needs endpoint of the form HOST:PORT or 'off', got endpoint={re.escape(repr(text))}; "
        r"write for example endpoint='127.0.0.1:50051'$"
    )
    with pytest.raises(ValueError, match=form):
        resolve(text, {})


def test_an_endpoint_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Publisher needs endpoint as a string or None, got endpoint=50051; write it"):
        resolve(50051, {})  # type: ignore[arg-type]


def test_the_argument_stands_before_the_environment_and_that_before_the_default() -> None:
    environ = {"GRADIOMETER_ENDPOINT": "stats:1"}
    assert resolve("here:2", environ) == Endpoint("here", 2)
    assert resolve(None, environ) == Endpoint("stats", 1)
    assert resolve(None, {}) == Endpoint("127.0.0.1", 50051)
    assert resolve(None, {"GRADIOMETER_ENDPOINT": "off"}) is None


def test_a_malformed_endpoint_in_the_environment_is_named_after_its_variable() -> None:
    with pytest.raises(ValueError, match=r"got GRADIOMETER_ENDPOINT='stats'; write for example GRADIOMETER_ENDPOINT="):
        resolve(None, {"GRADIOMETER_ENDPOINT": "stats"})


def test_loopback_is_known_by_its_address() -> None:
    assert all(Endpoint(host, 1).is_loopback for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"))
    assert not any(Endpoint(host, 1).is_loopback for host in ("10.0.0.1", "example.org", "127.0.0.1.example.org"))


@pytest.mark.parametrize(("value", "disabled"), [("1", True), ("true", True), ("0", False), ("", False), ("no", False)])
def test_publishing_can_be_disabled(value: str, disabled: bool) -> None:
    assert is_disabled({"GRADIOMETER_DISABLE": value}) is disabled
    assert not is_disabled({})


def test_credentials_come_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(b"pem")
    environ = {"GRADIOMETER_TOKEN": "t", "GRADIOMETER_CA": str(tmp_path / "ca.pem")}
    assert Credentials.of(environ) == Credentials("t", b"pem")
    assert Credentials.of({}) == Credentials(None, None)


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Publisher needs a readable PEM file, got GRADIOMETER_CA=.*nothing.*No such"):
        Credentials.of({"GRADIOMETER_CA": str(tmp_path / "nothing")})
