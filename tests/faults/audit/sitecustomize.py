"""On PYTHONPATH: every Python process that looks up a global while unpickling is ended, with a line that says where.

`make smoke` runs with it, so the workflow, its jobs, their workers and lm-eval are all watched. Python imports a module of this
name at its start. Messages of multiprocessing through its own pipes are exempt; a run of the smoke suite needs no other
exemption.
"""

import os
import sys

PIPES = "connection pool queues spawn forkserver managers".split()
EXEMPT = tuple(os.path.join("multiprocessing", f"{name}.py") for name in PIPES)
"""Files whose functions may unpickle: both ends are processes of one program."""
CODE = 66
"""Exit code of a process that was ended."""


def hook(event: str, arguments: tuple[object, ...]) -> None:
    if event != "pickle.find_class":
        return
    frame = caller = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(EXEMPT):
            return
        frame = frame.f_back
    where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
    line = f"audit: {where} unpickles {arguments[0]}.{arguments[1]}; nothing that is read may be unpickled\n"
    os.write(2, line.encode("utf-8", "backslashreplace"))
    os._exit(CODE)


sys.addaudithook(hook)
