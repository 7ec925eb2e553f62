"""On PYTHONPATH: forked processes append to $CPPO_WATCHED every event that a text can cause only by being run as code.

A line is an event: its name and its argument. `cppo.rewards.verify_worker` judges in forks of itself, so its own imports are
not listed.
"""

import os
import sys

STARTED = os.getpid()
LOG = os.environ.get("CPPO_WATCHED")
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CODE = tuple(
    "compile subprocess. socket. ctypes. pickle. shutil. os.system os.exec os.posix_spawn os.spawn os.fork os.remove os.rename"
    " os.mkdir os.rmdir os.chmod os.putenv os.kill".split()
)


def hook(event: str, arguments: tuple[object, ...]) -> None:
    if os.getpid() == STARTED:
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITE:
        note(event, arguments[0])
    elif event == "exec":
        note(event, getattr(arguments[0], "co_filename", arguments[0]))
    elif event.startswith(CODE):
        note(event, arguments[:2])


def note(event: str, what: object) -> None:
    os.write(LOG_FILE, f"{event} {what!r}\n".encode("utf-8", "backslashreplace"))


if LOG:
    # Above the three descriptors that a worker's forks close.
    LOG_FILE = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(hook)
