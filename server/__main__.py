"""A server for scripts: prints one line of JSON, its addresses, when it is ready."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from gradiometer.server.app import Bound, run
from gradiometer.server.settings import Settings
from gradiometer.stats_core.errors import GradiometerError


def main() -> int:
    """Serve; 0 after a clean stop, 2 where the server can't start."""
    parser = argparse.ArgumentParser(prog="python -m gradiometer.server", description=__doc__)
    parser.add_argument("--grpc", metavar="HOST:PORT")
    parser.add_argument("--http", metavar="HOST:PORT")
    parser.add_argument("--data", metavar="DIR", type=Path)
    parser.add_argument("--allow-remote", action="store_const", const=True)
    flags = parser.parse_args()
    try:
        run(Settings.load(**vars(flags)), ready=_announce)
    except (GradiometerError, ValueError) as error:
        sys.stderr.write(f"gradiometer: {error}\n")
        return 2
    return 0


def _announce(bound: Bound) -> None:
    sys.stdout.write(json.dumps(dataclasses.asdict(bound)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
