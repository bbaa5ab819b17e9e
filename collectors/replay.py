"""Sends what earlier processes left in the spool folder."""

import logging
from pathlib import Path

from gradiometer.collectors.outbox import Outbox
from gradiometer.collectors.quiet_grpc import grpc
from gradiometer.collectors.spool import leftovers
from gradiometer.collectors.stream import DATA_FAULTS, Metadata, Stream, status
from gradiometer.protos.ingest_pb2_grpc import IngestServiceStub

__all__ = ["replay"]

_log = logging.getLogger("gradiometer")


def replay(stub: IngestServiceStub, folder: Path, metadata: Metadata = ()) -> int:
    """Send what earlier processes left in the spool folder; a file that the server refuses is set aside.

    Args:
        stub: of a server that answers.
        folder: where the spools lie.
        metadata: sent with each call.

    Returns:
        How many spools were sent whole. Stops early, and harmlessly, where the connection is lost.
    """
    sent = 0
    for spool in leftovers(folder):
        outbox = Outbox(spool=spool)
        waiting = outbox.last - outbox.acknowledged
        try:
            while not outbox.is_empty:
                stream = Stream(stub, spool.run, outbox, metadata)
                stream.converse()
                if not stream.progressed and not outbox.is_empty:
                    break
        except grpc.RpcError as error:
            code, details = status(error)
            if code in DATA_FAULTS:
                aside = outbox.set_aside("rejected")
                _log.warning(
                    "a spool of run %s was refused (%s: %s) and set aside as %s",
                    spool.run.run_id,
                    code.name,
                    details,
                    aside,
                )
                continue
            outbox.close()
            return sent
        except ValueError:  # the channel was closed meanwhile
            outbox.close()
            return sent
        if outbox.close() == 0:
            sent += 1
            if waiting:
                _log.info("batches of run %s sent from the spool: %d", spool.run.run_id, waiting)
    return sent
