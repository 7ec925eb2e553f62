"""Rollout engines by name. A new engine is one module with a class, and one entry in `ENGINES`.

The class implements the protocol `cppo.rollout.types.Engine`. It is started as `Class.start(checkpoint, policy, scale)`: the
folder of the weights to begin with, the policy beside which it samples in training (None = it has its GPU to itself), and the
setting's `scale`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSpec:
    """Facts about an engine that are known before it is imported."""

    module: str
    """The module of its class. It is imported only where a run asks for the engine, because its packages may be missing."""
    name: str
    """The name of the class."""
    full: bool
    """Whether it can record whole distributions of mu."""
    install: str
    """How to install the engine's packages, as text for an error."""


ENGINES = {
    "torch": EngineSpec("cppo.rollout.torch_engine", "TorchEngine", full=True, install="pip install cppo-bench"),
    "vllm": EngineSpec(
        "cppo.rollout.vllm_engine", "VllmEngine", full=False, install="docs/cluster.md, section vLLM, says how"
    ),
}
"""Name in `scale.engine` -> the engine."""
