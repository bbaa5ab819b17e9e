"""The errors of gradiometer, each with the gRPC status that a server answers it with.

::

    GradiometerError
    ├── MissingDependency      a framework or library that is not installed
    ├── UnsupportedModel       no parameter of the model has per-example gradients
    ├── WireError
    │   ├── OurFault           the server broke its own rules
    │   └── PeerFault          the other side sent something it may not send
    └── StoreError             the data directory can't be used

A caller's plain mistake is a ``ValueError`` or ``TypeError``. Every message reads
``<who> needs <condition>, got <name>=<value>; <what to do>``.
"""

__all__ = [
    "GradiometerError",
    "MissingDependency",
    "OurFault",
    "PeerFault",
    "StoreError",
    "UnsupportedModel",
    "WireError",
]


class GradiometerError(Exception):
    """Anything that gradiometer raises on purpose."""

    status: str = "INTERNAL"


class MissingDependency(GradiometerError, ImportError):
    """A library that a feature needs is not installed; the message says what to install."""

    status = "FAILED_PRECONDITION"


class UnsupportedModel(GradiometerError, ValueError):
    """The model has no per-example gradients at all, as with BatchNorm in training mode."""

    status = "INVALID_ARGUMENT"


class WireError(GradiometerError):
    """A conversation between a publisher and a server went wrong."""


class OurFault(WireError):
    """This side of the conversation is at fault."""

    status = "INTERNAL"


class PeerFault(WireError):
    """The other side is at fault; ``status`` says how (the name of a gRPC status code)."""

    status = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, status: str = "INVALID_ARGUMENT") -> None:
        """Keep the message and the name of the gRPC status that answers it."""
        super().__init__(message)
        self.status = status


class StoreError(GradiometerError):
    """The store can't be opened or written: locked, from another version, or damaged."""

    status = "FAILED_PRECONDITION"

    def __init__(self, message: str, *, status: str = "FAILED_PRECONDITION") -> None:
        """Keep the message and the status; one that may be tried again (a full disk) is ``RESOURCE_EXHAUSTED``."""
        super().__init__(message)
        self.status = status
