"""Engines by name."""

from pathlib import Path

from transformers import PreTrainedModel

from cppo.rollout.types import Engine
from cppo.suite.config import Scale
from cppo.training.distributed import device_of

ALONE = 0.9
"""Share of a GPU's memory for an engine that no training shares it with."""


def engine(scale: Scale | None, checkpoint: str | Path, policy: PreTrainedModel | None = None) -> Engine:
    """The engine that `scale` asks for, with the checkpoint's weights; in training beside `policy`, else alone on its GPU.

    Raises ValueError when vLLM is asked for and is not installed or does not start.
    """
    # Imported late: the engines import this module, and vLLM is installed only where a run asks for it.
    if scale is None or scale.engine == "torch":
        from cppo.models.load import load_pretrained
        from cppo.rollout.torch_engine import TorchEngine

        return TorchEngine(load_pretrained(checkpoint).to(device_of(scale)) if policy is None else policy)
    try:
        from cppo.rollout.vllm_engine import VllmEngine
    except ModuleNotFoundError as error:
        raise ValueError(
            f"scale.engine: {error.name} is not installed; docs/cluster.md, section vLLM, says how"
        ) from None
    if policy is None:
        return VllmEngine(checkpoint, scale.precision, ALONE)
    return VllmEngine(checkpoint, scale.precision, scale.vllm_memory, scale.vllm_gpus)
