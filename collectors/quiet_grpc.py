"""gRPC without its fork handlers: import it from here.

With a stream open the handlers can do nothing but write a line to standard error at every fork, such as that of
each data-loading worker; and in a forked child nothing here uses gRPC. It looks at the environment when it is
first imported: where the user's own code has done so already, or has set the variable, nothing changes.
"""

import os

_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"
_said = _VARIABLE in os.environ
os.environ.setdefault(_VARIABLE, "0")

import grpc  # noqa: E402

if not _said:
    del os.environ[_VARIABLE]  # this process's children decide for themselves

__all__ = ["grpc"]
