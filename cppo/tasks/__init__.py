"""Task families: problems with answers that a machine can check. A family is one file, and one entry in `AnyTask`.

Which methods a family has is told in `cppo.tasks.types`.
"""

from typing import Annotated

from pydantic import Field

from cppo.tasks.chain import ChainTask
from cppo.tasks.file import FileTask
from cppo.tasks.math import MathTask
from cppo.tasks.reduce import ReduceTask

AnyTask = Annotated[ChainTask | ReduceTask | MathTask | FileTask, Field(discriminator="family")]
"""The settings of a task of any family."""
