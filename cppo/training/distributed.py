"""One or several processes, through accelerate: placement, mixed precision, copies and shards of the model, trackers.

With several processes the model is copied to each (distributed data parallel, DDP) or sharded over them (fully sharded data
parallel, FSDP2). A run's numbers do not depend on the number of ranks. Sampling noise and minibatches are the run's. Rank r
samples, judges and trains on its own prompts of them. Each loss is divided by the whole step's denominator. What needs all
rows (advantages, metrics) is gathered, so every rank holds the whole rollout in main memory.
Several nodes and model-parallel training are left to verl.

Legend: R ranks. A rank is one of the processes. The main process (rank 0) alone writes files.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from cppo.suite.config import Optimizer, RunConfig, Scale

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")


def main_process() -> bool:
    """Whether this process is the main one, as the launcher says. It can be asked before there is an accelerator."""
    return os.environ.get("RANK", "0") == "0"


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError when a tracker's package is missing: accelerate would leave the tracker out in silence."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: {name} is not installed; `pip install {name}`, or leave it out of the suite")


def make_accelerator(scale: Scale | None, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The process's accelerator: a GPU where there is one and the setting has a `scale`, else the CPU.

    trackers: names of `Suite.report_to`. folder: where those that write files write.
    """
    use_cpu = scale is None or not torch.accelerator.is_available()
    scale = scale or Scale()
    plugin = None
    if scale.sharding == "fsdp2" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=half if scale.precision == "bfloat16" else None,
        )
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="bf16" if scale.precision == "bfloat16" else "no",
        fsdp_plugin=plugin,
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    if plugin is not None and not accelerator.is_fsdp2:
        # On a CPU accelerate takes DDP instead, in silence, though FSDP2 runs on the CPU's backend (gloo) too.
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def start_trackers(accelerator: Accelerator, run: RunConfig) -> None:
    """Begin a run of every tracker, or continue it."""
    name = f"{run.setting_name}-{run.rule_name}-{run.seed}"
    options = {"wandb": {"name": name, "id": run.id, "resume": "allow"}, "trackio": {"name": name, "resume": "allow"}}
    description = {"id": run.id, "setting": run.setting_name, "rule": run.rule_name, "seed": run.seed}
    accelerator.init_trackers("cppo", description, options)


def rank_slice(accelerator: Accelerator, count: int) -> range:
    """The contiguous slice of range(count) that belongs to this rank. Slice sizes differ by at most one; one may be empty."""
    ranks, rank = accelerator.num_processes, accelerator.process_index
    return range(rank * count // ranks, (rank + 1) * count // ranks)


def largest_slice(accelerator: Accelerator, count: int) -> int:
    """The size of the largest slice of range(count) that a rank has."""
    ranks: int = accelerator.num_processes
    return -(-count // ranks)


def all_gather(value: Result) -> list[Result]:
    """Every rank's value, in the order of ranks. Each rank must call it."""
    values: list[Result] = gather_object([value])
    return values


class Hooked(nn.Module, Generic[Module]):
    """Runs functions of a module inside a forward pass of its own, which mixed precision, DDP and FSDP2 have hooks on."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module
        # FSDP2 makes a shard of each of these classes: the decoder layers, as transformers names them.
        names = (getattr(part, "_no_split_modules", None) or () for part in module.modules())
        self._no_split_modules = sorted({name for names_of_part in names for name in names_of_part})

    def forward(self, function: Callable[[Module], Result]) -> Result:
        """function(module)."""
        return function(self.module)


class Learner(Generic[Module]):
    """A module and its AdamW optimiser, spread over the ranks."""

    def __init__(self, accelerator: Accelerator, module: Module, lr: float, optimizer: Optimizer) -> None:
        """lr: the peak learning rate. The one in `optimizer` is not read."""
        self.accelerator, self.module, self.lr, self.grad_clip = accelerator, module, lr, optimizer.grad_clip
        adamw = torch.optim.AdamW(
            module.parameters(), lr=lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        self.hooked, self.optimizer = accelerator.prepare(Hooked(module), adamw)

    def __call__(self, function: Callable[[Module], Result]) -> Result:
        """function(module) for training. Every rank must call it equally often: under FSDP2 each rank gives its weights."""
        result: Result = self.hooked(function)
        return result

    @torch.no_grad()
    def with_full_parameters(self, function: Callable[[Module], Result]) -> Result:
        """function(module) under no_grad with the parameters gathered on every rank, so that ranks may make different numbers
        of forward passes.

        Every rank must call it. Under FSDP2 a rank holds all weights meanwhile: 4 bytes per parameter, 2 in bfloat16.
        """
        shards = [part for part in self.hooked.modules() if isinstance(part, FSDPModule)]  # the root first

        def unsharded(module: Module) -> Result:
            for shard in shards:
                shard.set_reshard_after_forward(False, recurse=False)
                shard.unshard()
            return function(module)

        result: Result = self.hooked(unsharded)
        for i, shard in enumerate(shards):
            shard.set_reshard_after_forward(i > 0, recurse=False)  # the root's are needed first in the backward pass
            shard.reshard()
        return result

    def optimizer_step(self, losses: Sequence[Callable[[], Tensor]], share: float) -> tuple[float, float]:
        """One AdamW step on the sum of the losses of all micro-batches and ranks; (that sum, the norm of its gradient).

        losses: one function for each micro-batch of this rank; every rank has equally many. share: of the peak learning rate.
        The gradient is clipped to the norm `grad_clip`. A loss or gradient that is not finite changes nothing and gives a NaN
        norm, on every rank.
        """
        self.optimizer.zero_grad()
        values = []
        for i, loss in enumerate(losses):
            with nullcontext() if i + 1 == len(losses) else self._no_sync():
                value = loss()
                # DDP and FSDP2 take the mean of the ranks' gradients. The loss is a share of the whole step's, already
                # divided by its denominator, so the sum is wanted, and the mean is undone.
                self.accelerator.backward(value * self.accelerator.num_processes)
            values.append(value.detach())
        total = float(self.accelerator.reduce(torch.stack(values).sum()))
        gradient = torch.nn.utils.clip_grad_norm_(self.hooked.parameters(), self.grad_clip)
        norm = float(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)
        if not (math.isfinite(total) and math.isfinite(norm)):
            return total, math.nan
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share
        self.optimizer.step()
        return total, norm

    def _no_sync(self) -> AbstractContextManager[None]:
        """DDP adds gradients up within this context before it sends them. FSDP2 sends those of each micro-batch, because the
        gradients of the whole model may not fit into memory."""
        return nullcontext() if self.accelerator.is_fsdp2 else self.accelerator.no_sync(self.hooked)

    # Saving and resuming: whole tensors, so that another number of ranks can continue ----------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The module's tensors on the CPU of the main process. Every rank must call it. A tied tensor has one name."""
        tensors = self.module.state_dict()
        parameters = {name for name, _ in self.module.named_parameters()}
        tied = {name for name, x in self.module.named_parameters(remove_duplicate=False)} - parameters
        return self._collected({name: x for name, x in tensors.items() if name not in tied})

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's state of each parameter, as "<parameter>.<name>", where `weights` has the module's."""
        state = self.optimizer.state_dict()["state"]
        return self._collected({f"{i}.{name}": x for i, entries in state.items() for name, x in entries.items()})

    def load(self, weights: dict[str, Tensor], optimizer_state: dict[str, Tensor]) -> None:
        """Put back the tensors that `weights` and `optimizer_state` gave."""
        now = self.module.state_dict()
        shards = {name: _like(now[name], x) for name, x in weights.items()}
        missing, unexpected = self.module.load_state_dict(shards, strict=False)
        tied = {name for name, _ in self.module.named_parameters(remove_duplicate=False)} - set(weights)
        assert not unexpected and set(missing) <= tied, (missing, unexpected)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, x in optimizer_state.items():
            index, _, name = key.partition(".")
            like = parameters[int(index)]
            state.setdefault(int(index), {})[name] = _like(like, x) if x.shape == like.shape else x
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _collected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of the main process, gathered one after the other; nothing on the other ranks."""
        collected = {}
        for name, x in tensors.items():
            whole = x.full_tensor() if isinstance(x, DTensor) else x  # every rank gives its part
            if self.accelerator.is_main_process:
                collected[name] = whole.to("cpu")
        return collected


def _like(tensor: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, which every rank holds, sharded as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return whole
    on_device = whole.to(tensor.device)
    return distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)
