"""One job in a fresh process that has numpy and the runtime, and neither torch nor the user's code.

The asking process calls `answered`; the module it names hands `serve` what to do.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from flyweight.errors import FlyweightError, VerificationError

__all__ = ["answered", "read", "serve"]

Job = TypeVar("Job", bound=msgspec.Struct)
Reply = TypeVar("Reply")


def answered(worker: str, job: msgspec.Struct, reply: type[Reply], *, folder: Path, where: str) -> Reply:
    """What the module `worker` replies to `job`, both by way of files in `folder`.

    Raises VerificationError, with `where`, when the runtime refuses its file or the process dies.
    """
    request, replied = folder / "job.json", folder / "reply.json"
    replied.unlink(missing_ok=True)
    request.write_bytes(msgspec.json.encode(job))
    # -P: a file numpy.py in the user's folder is not what the worker should import
    command = [sys.executable, "-P", "-m", worker, str(request), str(replied)]
    ended = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - our own module
    if not replied.is_file():
        last = ended.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise VerificationError("the process that runs the file died", where=where, why=" ".join(last))
    found = msgspec.json.decode(replied.read_bytes(), type=dict[str, msgspec.Raw])
    if "refused" in found:
        why = msgspec.json.decode(found["refused"], type=str)
        raise VerificationError("the runtime refuses the file", where=where, why=why)
    return msgspec.json.decode(found["reply"], type=reply)


def serve(kind: type[Job], work: Callable[[Job], object]) -> None:
    """The worker's side: does the job in the file that the command line names first, and replies in the second."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    request, replied = map(Path, sys.argv[1:])
    try:
        reply = {"reply": work(msgspec.json.decode(request.read_bytes(), type=kind))}
    except FlyweightError as error:
        reply = {"refused": str(error)}
    replied.write_bytes(msgspec.json.encode(reply))


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays by name of an .npz file."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
