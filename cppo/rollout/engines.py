"""Rollout engines by name. A new engine is one module with a class, and one entry in `ENGINES`.

Its class implements `cppo.rollout.types.Engine` and is constructed as `Class(checkpoint, policy, scale)`: the folder of the
weights to begin with, the policy beside which it trains (None = it is alone on its GPU), and the setting's `scale`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSpec:
    """What is known of an engine before it is imported."""

    module: str
    """Where its class is. It is imported only where a run asks for the engine, because its packages may be missing."""
    name: str
    """The class."""
    full: bool
    """Whether it can record whole distributions of mu."""
    install: str
    """How to install its packages."""


ENGINES = {
    "torch": EngineSpec("cppo.rollout.torch_engine", "TorchEngine", full=True, install="pip install cppo-bench"),
    "vllm": EngineSpec(
        "cppo.rollout.vllm_engine", "VllmEngine", full=False, install="docs/cluster.md, section vLLM, says how"
    ),
}
"""Name in `scale.engine` -> the engine."""
