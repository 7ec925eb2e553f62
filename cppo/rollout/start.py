"""Starting the engine that a setting asks for."""

import importlib
from pathlib import Path

from transformers import PreTrainedModel

from cppo.rollout.engines import ENGINES
from cppo.rollout.types import Engine
from cppo.suite.config import Scale


def start_engine(scale: Scale | None, checkpoint: str | Path, policy: PreTrainedModel | None = None) -> Engine:
    """The engine of `scale.engine` with the checkpoint's weights, beside `policy` in training, otherwise with a GPU to itself.

    Raises ValueError when the engine's packages are not installed, or when it does not start.
    """
    spec = ENGINES[Scale().engine if scale is None else scale.engine]
    try:
        module = importlib.import_module(spec.module)
    except ModuleNotFoundError as error:
        raise ValueError(f"scale.engine: {error.name} is not installed; {spec.install}") from None
    engine: Engine = getattr(module, spec.name).start(checkpoint, policy, scale)
    return engine
