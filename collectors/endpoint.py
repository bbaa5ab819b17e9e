"""Where measurements go: the address of a server, and what the environment says of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DEFAULT", "OFF", "Credentials", "Endpoint", "is_disabled", "resolve"]

DEFAULT = "127.0.0.1:50051"
OFF = "off"
_FORM = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|::1")


@dataclass(frozen=True)
class Endpoint:
    """The address of a server.

    Attributes:
        host: a name or an address; IPv6 without its brackets.
        port: 1 to 65535.

    Example:
        >>> str(Endpoint("::1", 50051))
        '[::1]:50051'
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True where the server is on this machine, by its address."""
        return _LOOPBACK.fullmatch(self.host) is not None


@dataclass(frozen=True)
class Credentials:
    """What a server may ask for.

    Attributes:
        token: bearer token (``GRADIOMETER_TOKEN``), or None.
        authority: certificates of the authorities to trust, PEM (file named by ``GRADIOMETER_CA``); None: no TLS.
    """

    token: str | None = None
    authority: bytes | None = None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Credentials":
        """Those that the environment names.

        Raises:
            ValueError: if the file of certificates can't be read.
        """
        path = environ.get("GRADIOMETER_CA")
        try:
            authority = Path(path).read_bytes() if path else None
        except OSError as error:
            raise ValueError(
                f"Publisher needs a readable PEM file, got GRADIOMETER_CA={path!r} ({error.strerror}); "
                "name the certificate of the server's authority"
            ) from None
        return cls(environ.get("GRADIOMETER_TOKEN") or None, authority)


def resolve(argument: str | None, environ: Mapping[str, str]) -> Endpoint | None:
    """The endpoint that an argument and the environment ask for.

    Args:
        argument: ``"HOST:PORT"``, ``"off"``, or None for ``GRADIOMETER_ENDPOINT``, else 127.0.0.1:50051.
        environ: the environment.

    Returns:
        The endpoint, or None where nothing is to be published.

    Raises:
        ValueError: if it is malformed.

    Example:
        >>> resolve("training-stats:50051", {})
        Endpoint(host='training-stats', port=50051)
        >>> resolve("http://localhost", {})
        Traceback (most recent call last):
            ...
        ValueError: Publisher needs endpoint of the form HOST:PORT or 'off', got endpoint='http://localhost'; \
write for example endpoint='127.0.0.1:50051'
    """
    name = "endpoint" if argument is not None else "GRADIOMETER_ENDPOINT"
    text = argument if argument is not None else environ.get("GRADIOMETER_ENDPOINT") or DEFAULT
    if not isinstance(text, str):
        raise TypeError(f"Publisher needs endpoint as a string or None, got endpoint={text!r}; write it as 'HOST:PORT'")
    if text.lower() == OFF:
        return None
    match = _FORM.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(
            f"Publisher needs {name} of the form HOST:PORT or 'off', got {name}={text!r}; "
            f"write for example {name}={DEFAULT!r}"
        )
    return Endpoint(match["v6"] or match["name"], int(match["port"]))


def is_disabled(environ: Mapping[str, str]) -> bool:
    """True where ``GRADIOMETER_DISABLE`` asks for nothing to be measured or published.

    Example:
        >>> is_disabled({"GRADIOMETER_DISABLE": "1"}), is_disabled({"GRADIOMETER_DISABLE": "0"})
        (True, False)
    """
    return environ.get("GRADIOMETER_DISABLE", "").strip().lower() not in ("", "0", "false", "no", "off")
