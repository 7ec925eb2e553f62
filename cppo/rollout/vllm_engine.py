"""Rollout engine on vLLM 0.32's offline `LLM`, which runs in processes of its own beside the trainer.

Differences from the torch engine:

1. It has its own copy of the weights: `sync` writes the policy as a checkpoint, and vLLM reads it. On a CPU vLLM reports
   success but is wrong for tied embeddings and mixtures of experts. So the log-probabilities of its samples are compared with
   the trainer's (`cppo.training.batches.BatchBuilder.mismatch`).
2. Each row has a seed, a hash of its first uniforms; the noise within a row is vLLM's. Equal prompts share their keys and
   values through the prefix cache, so that a row's seed is its own, whatever is sampled beside it.
3. With top_p < 1 vLLM knows log-probabilities after the cut only. They are NaN then.
"""

import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, Literal

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from cppo.rollout.sampling import end_tokens
from cppo.rollout.types import SAMPLED_ONLY, EngineDied, Policy, Record, Rollouts
from cppo.suite.config import Scale

STANDALONE_MEMORY = 0.9
"""Share of a GPU's memory for an engine that no training shares it with."""
SEED_POSITIONS = 8
"""Positions of a row's noise that make its seed. Two rows that agree in all of them would get the same response. Each position
has 24 random bits, so with 8 of them (192 bits, more than the seed's 63) that does not happen."""
CPU_CACHE_BYTES = 2**30
"""Bytes of keys and values on a CPU, where vLLM is for tests only."""
SHUTDOWN_SECONDS = 30.0
"""Seconds after which vLLM's processes are killed if they have not ended by themselves."""


class VllmEngine:
    """Samples from a checkpoint, or after `sync` from the policy's weights.

    gpus: how many GPUs are the engine's own, the last visible ones, of which each training process gets an equal share; 0 = it
    uses the trainer's GPU, which it leaves between `sleep` and `sync`. memory: share of a GPU's memory. A CPU needs neither.
    Raises ValueError when vLLM does not start.
    """

    separate = True

    def __init__(
        self, checkpoint: str | Path, precision: Literal["float32", "bfloat16"], memory: float, gpus: int = 0
    ) -> None:
        disable_progress_bar()  # it would print a line for every written checkpoint, so for every rollout
        on_gpu = torch.cuda.is_available()
        devices = _devices(gpus) if on_gpu else []
        self.sleeps, self.asleep = on_gpu and gpus == 0, False
        self.ends = end_tokens(_generation_config(Path(checkpoint)))
        self.folder = tempfile.TemporaryDirectory(prefix="cppo-vllm-")
        options: dict[str, Any] = (
            {
                "gpu_memory_utilization": memory,
                "tensor_parallel_size": len(devices),
                "enable_sleep_mode": self.sleeps,
            }
            if on_gpu
            else {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True}
        )
        before = multiprocessing.active_children()
        try:
            with _processes_see(devices):
                self.llm = LLM(
                    str(checkpoint),
                    dtype=precision,
                    load_format="safetensors",
                    trust_remote_code=False,
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    max_logprobs=-1,
                    use_tqdm_on_load=False,
                    **options,
                )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{checkpoint}: vLLM did not start, its messages are above: {reason}") from error
        self.processes = [child for child in multiprocessing.active_children() if child not in before]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        temperature: float,
        top_p: float = 1.0,
        record: Record = SAMPLED_ONLY,
    ) -> Rollouts:
        """See `cppo.rollout.types.Engine`.

        Raises ValueError when prompt and response are longer than the model's positions, and when vLLM has died.
        """
        rows, width = uniforms.shape
        assert rows == len(prompts) and not record.full and (top_p == 1 or record == SAMPLED_ONLY)
        longest, limit = max(map(len, prompts)) + width, self.llm.model_config.max_model_len
        if longest > limit:
            raise ValueError(
                f"rollout.max_response_tokens: {width} after the longest prompt are {longest} tokens, but the model has "
                f"{limit} positions"
            )
        params = [
            SamplingParams(
                seed=row_seed(noise),
                temperature=temperature,
                top_p=top_p,
                max_tokens=width,
                stop_token_ids=list(self.ends),
                ignore_eos=True,  # vLLM's own end token; the checkpoint's are in stop_token_ids
                logprobs=record.top_k if top_p == 1 else None,
                flat_logprobs=True,
                detokenize=False,
            )
            for noise in uniforms
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        requests = self._call(self.llm.generate, inputs, params, use_tqdm=False)
        outputs = [request.outputs[0] for request in requests]
        return self._rollouts(tuple(tuple(p) for p in prompts), outputs, record.top_k)

    def _rollouts(self, prompts: tuple[tuple[int, ...], ...], outputs: list[Any], k: int) -> Rollouts:
        """vLLM's lists of tokens and log-probabilities as tensors."""
        rows, width = len(outputs), max(len(output.token_ids) for output in outputs)
        responses = torch.zeros(rows, width, dtype=torch.int64)
        mask = torch.zeros(rows, width, dtype=torch.bool)
        logp = torch.zeros(rows, width)
        topk_ids = torch.zeros(rows, width, k, dtype=torch.int32) if k else None
        topk_logp = torch.zeros(rows, width, k) if k else None
        truncated = torch.zeros(rows, dtype=torch.bool)
        for row, output in enumerate(outputs):
            length = len(output.token_ids)
            responses[row, :length] = torch.tensor(output.token_ids)
            mask[row, :length] = True
            truncated[row] = output.token_ids[-1] not in self.ends
            if output.logprobs is None:
                logp[row, :length] = torch.nan
                continue
            # At each position: the sampled token, then the K likeliest in falling order.
            values = torch.tensor(output.logprobs.logprobs).view(length, 1 + k)
            logp[row, :length] = values[:, 0]
            if topk_ids is not None and topk_logp is not None:
                topk_logp[row, :length] = values[:, 1:]
                topk_ids[row, :length] = torch.tensor(output.logprobs.token_ids).view(length, 1 + k)[:, 1:]
        return Rollouts(prompts, responses, mask, truncated, logp, topk_ids, topk_logp)

    @classmethod
    def start(cls, checkpoint: str | Path, policy: PreTrainedModel | None, scale: Scale | None) -> "VllmEngine":
        """See `cppo.rollout.types.Engine`."""
        scale = scale or Scale()
        if policy is None:
            return cls(checkpoint, scale.precision, STANDALONE_MEMORY)
        return cls(checkpoint, scale.precision, scale.engine_memory, scale.engine_gpus)

    def sync(self, policy: Policy) -> None:
        """See `cppo.rollout.types.Engine`. The main process writes one checkpoint for all: they are on one node.

        Raises ValueError when vLLM has died.
        """
        weights, (folder, *_) = policy.weights(), gather_object([self.folder.name])
        if policy.accelerator.is_main_process:
            policy.module.save_pretrained(folder, state_dict=weights)
        policy.accelerator.wait_for_everyone()
        if self.asleep:
            self._call(self.llm.wake_up, ["weights"])
        self._call(self.llm.collective_rpc, "reload_weights", kwargs={"weights_path": folder})
        if self.asleep:
            self._call(self.llm.wake_up, ["kv_cache"])
        self.asleep = False
        self._call(self.llm.reset_prefix_cache)

    def sleep(self) -> None:
        """See `cppo.rollout.types.Engine`. Level 2: `sync` brings new weights anyway, so the old ones are dropped."""
        if self.sleeps:
            self._call(self.llm.sleep, level=2)
            self.asleep = True

    def close(self) -> None:
        """End vLLM's processes."""
        self.llm.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_SECONDS)
        self.folder.cleanup()

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The result of one of vLLM's functions. Raises EngineDied when vLLM's process has ended.

        The call is made in a thread, because `LLM` waits forever for the answer of a process that was killed while it worked.
        """
        answer: Future[Any] = Future()

        def ask() -> None:
            try:
                answer.set_result(function(*args, **options))
            except BaseException as error:  # handed over to the waiting thread
                answer.set_exception(error)

        Thread(target=ask, daemon=True).start()
        while not answer.done() and all(process.is_alive() for process in self.processes):
            wait([answer], timeout=1.0)
        try:
            if answer.done():
                return answer.result()
        except EngineDeadError:
            pass
        raise EngineDied(
            "engine vllm: its process died, its messages are above; start again: the run continues from its last saved state"
        )


def row_seed(noise: Tensor) -> int:
    """A row's seed from its noise [T]: 63 bits."""
    return int.from_bytes(hashlib.sha256(noise[:SEED_POSITIONS].numpy().tobytes()).digest()[:8], "big") >> 1


def _generation_config(checkpoint: Path) -> GenerationConfig:
    """The configuration that transformers gives to a loaded model: from its own file, or else from the model's."""
    if (checkpoint / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(checkpoint, trust_remote_code=False)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(checkpoint, trust_remote_code=False))


def _devices(gpus: int) -> list[str]:
    """The GPUs of this process's engine, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    if gpus == 0:
        return [visible[torch.cuda.current_device()]]
    rank, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if gpus % processes or gpus + processes > len(visible):
        raise ValueError(
            f"scale.engine_gpus: {gpus} must be a multiple of the {processes} training processes, and with one GPU for each "
            f"of these at most the {len(visible)} visible GPUs"
        )
    share = gpus // processes
    engines = visible[-gpus:]
    return engines[rank * share : (rank + 1) * share]


@contextmanager
def _processes_see(devices: list[str]) -> Iterator[None]:
    """Processes that are started in the block see these GPUs only. For an empty list nothing changes."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    if devices:
        os.environ[name] = ",".join(devices)
    try:
        yield
    finally:
        if devices and before is None:
            del os.environ[name]
        elif before is not None:
            os.environ[name] = before
