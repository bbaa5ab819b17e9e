"""What a server can be told: by flags, else ``GRADIOMETER_*`` in the environment, else ``gradiometer.toml``."""

import ipaddress
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

__all__ = ["Address", "Settings"]

_FORM = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
MIB = 1 << 20


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: a name or an address; IPv6 without its brackets.
        port: 0 to 65535; 0 lets the system choose one.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """An address from ``HOST:PORT`` or ``[IPV6]:PORT``.

        Raises:
            ValueError: if it is malformed.

        Example:
            >>> Address.parse("[::1]:9464")
            Address(host='::1', port=9464)
        """
        match = _FORM.fullmatch(text)
        if match is None or int(match["port"]) > 65535:
            raise ValueError(f"needs HOST:PORT, got {text!r}; write for example '127.0.0.1:50051'")
        return cls(match["v6"] or match["name"], int(match["port"]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True where only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _checked_address(text: str) -> str:
    return str(Address.parse(text))


AddressText = Annotated[str, AfterValidator(_checked_address)]


class Settings(BaseSettings):
    """The settings of a server; `load` reads them from everywhere.

    Attributes:
        grpc: HOST:PORT for training jobs and queries.
        http: HOST:PORT for the live page and ``/metrics``.
        data: the data directory; made where it is missing.
        allow_remote: listen beyond loopback although nothing is encrypted or authenticated.
        max_message_bytes: largest gRPC message taken or sent.
        max_queued_bytes: streams are not read while more than this waits for the journal.
        window_steps: measured steps that live ratios are formed over.
        replay_steps: stored steps of each recent run that the live page shows after a restart.
        replay_runs: number of recent runs.
        roll_bytes: journalled bytes of a run that make a segment.
        roll_seconds: age of a run's oldest journalled batch that makes a segment.
        roll_check_seconds: how often the roller looks.
        export_all_layers: ``/metrics`` shows every layer of every model; else of models of more than 64 layers
            the 20 with the lowest signal-to-noise ratio.
        export_max_series: at most so many series of single layers, over all runs.
        stop_seconds: how long open streams and pages may take to end at shutdown.
    """

    model_config = SettingsConfigDict(
        env_prefix="GRADIOMETER_", toml_file="gradiometer.toml", extra="forbid", frozen=True, validate_default=True
    )

    grpc: AddressText = "127.0.0.1:50051"
    http: AddressText = "127.0.0.1:9464"
    data: Path = Path("gradiometer-data")
    allow_remote: bool = False
    max_message_bytes: int = Field(8 * MIB, ge=64 * 1024, le=1024 * MIB)
    max_queued_bytes: int = Field(64 * MIB, ge=MIB)
    window_steps: int = Field(32, ge=1, le=100_000)
    replay_steps: int = Field(2048, ge=1)
    replay_runs: int = Field(16, ge=0)
    roll_bytes: int = Field(16 * MIB, ge=4096)
    roll_seconds: float = Field(600.0, gt=0)
    roll_check_seconds: float = Field(1.0, gt=0)
    export_all_layers: bool = False
    export_max_series: int = Field(50_000, ge=0)
    stop_seconds: float = Field(3.0, ge=0)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file; no ``.env`` and no secrets directory."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def load(cls, **flags: Any) -> Self:
        """Read the settings; flags that are None were not given.

        Raises:
            ValueError: in one line, naming the setting and what it was.

        Example:
            >>> Settings.load(grpc="nowhere")
            Traceback (most recent call last):
                ...
            ValueError: serve needs HOST:PORT, got grpc='nowhere'; write for example '127.0.0.1:50051'
        """
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            raise ValueError(_in_one_line(error)) from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"serve needs a TOML file, got gradiometer.toml: {error}; mend that line") from None

    def check_reach(self) -> list[str]:
        """Refuse to listen beyond loopback unless told to.

        Returns:
            A warning for each address that others can reach.

        Raises:
            ValueError: if there is one and ``allow_remote`` is off.
        """
        warnings = []
        for name in ("grpc", "http"):
            address = Address.parse(getattr(self, name))
            if address.is_loopback:
                continue
            if not self.allow_remote:
                raise ValueError(
                    f"serve needs a loopback address, got {name}={str(address)!r}; nothing is encrypted or "
                    "authenticated, so tunnel to it, or pass --allow-remote on a network that you trust"
                )
            warnings.append(f"{name} listens on {address}: everyone who reaches it can read and write, unencrypted")
        return warnings


def _in_one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name, value = ".".join(map(str, first["loc"])), first["input"]
    if first["type"] == "extra_forbidden":
        return f"serve needs settings in {tuple(Settings.model_fields)}, got {name}={value!r}; remove or rename it"
    condition = first["msg"].removeprefix("Value error, ")
    condition, _, advice = condition.partition("; ")
    condition = condition.partition(", got ")[0]
    if not condition.startswith("needs "):
        condition, advice = f"needs {name} as its type asks ({condition})", "correct it"
    return f"serve {condition}, got {name}={value!r}; {advice}"
