"""External interruptions of a long job (SIGTERM, out of memory), reported separately from bugs."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import torch

TRY_AGAIN = 75
"""Exit code of an interrupted job (EX_TEMPFAIL): its state is saved, and the same command continues it."""


class Interrupted(Exception):
    """The job was told to stop and has saved its state."""


class Terminated:
    """True once SIGTERM has come within the block. Outside the block the signal does what it did before."""

    def __init__(self) -> None:
        self.seen = False

    def __bool__(self) -> bool:
        return self.seen

    def __enter__(self) -> "Terminated":
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True


@contextmanager
def enough_memory(folder: Path, iteration: int) -> Iterator[None]:
    """Turn running out of memory, on an accelerator or on the CPU, into a ValueError that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # PyTorch's CPU allocator raises a plain RuntimeError. Any other RuntimeError is a bug and passes.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(
            f"{folder}: out of memory in iteration {iteration}; lower scale.micro_rows (or rollout.minibatch), or ask for "
            "more memory, and start again: the run continues from the last saved state"
        ) from error
