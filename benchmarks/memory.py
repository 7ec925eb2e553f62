"""Memory and time of the policy's log-probabilities at the paper's vocabulary, side by side with full logits.

    OMP_NUM_THREADS=1 python benchmarks/memory.py     # 3,072 tokens, float32: memory_cpu.csv, in 7 minutes and 7 GB
    python benchmarks/memory.py --device cuda         # 8,192 tokens, bfloat16: memory_cuda.csv, in 25 GB of the GPU

Both sides start from the same hidden states and output head (V = 151,936, H = 1,024) and give log-probability and entropy
of the sampled tokens and the log-probabilities of 20 given ids, forward and backward. "full logits" makes [N, V] once and
leaves the rest to autograd; its logits are float32 as ours are.

Every case runs in a fresh process, in alternation. Memory is the process's peak above that of a process which only holds
the weights and their gradients: the peak resident set, on a GPU `torch.cuda.max_memory_allocated`. A difference is the
largest of all elements, relative to the largest element of the full-logits side.

Bounds on a GPU (the committed numbers are a CPU's): memory_ratio is at most 0.1, time_ratio at most 1.5. Differences of
log-probabilities and entropy are at most 1e-5, those of the gradients, which bfloat16 rounds to 8 bits, at most 0.01.
"""

import argparse
import csv
import gc
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from cppo.models.logprobs import TokenLogprobsFunction

VOCABULARY, WIDTH, K, TEMPERATURE = 151_936, 1024, 20, 0.9
NAMES = ("logp", "entropy", "topk_logp", "hidden.grad", "weight.grad")
ROUNDS = 2


def full(hidden: Tensor, weight: Tensor, sampled: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and top-K from all logits at once."""
    logits = torch.nn.functional.linear(hidden.float(), weight.float())
    logp = torch.log_softmax(logits.div_(TEMPERATURE), -1)
    with torch.no_grad():
        entropy, topk = -(logp.exp().mul_(logp)).sum(-1), logp.gather(-1, ids)
    return logp.gather(-1, sampled.unsqueeze(-1)).squeeze(-1), entropy, topk


def ours(hidden: Tensor, weight: Tensor, sampled: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in chunks."""
    logp, entropy, _, topk = TokenLogprobsFunction.apply(hidden, weight, sampled, TEMPERATURE, ids, 0, False)
    return logp, entropy, topk


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "full logits": full,
    "ours": ours,
}


def measure(side: str, tokens: int, device: str, folder: str) -> tuple[float, float]:
    """(peak bytes, seconds) of one forward and backward pass; without a side those of weights and gradients alone.

    The results go to `folder`. To be run in a process of its own.
    """
    torch.set_float32_matmul_precision("high")  # on a GPU: TF32, which holds bfloat16 numbers exactly
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g, device=device, dtype=dtype).mul_(0.05).requires_grad_()
    hidden = torch.randn(tokens, WIDTH, generator=g, device=device, dtype=dtype).requires_grad_()
    sampled = torch.randint(VOCABULARY, (tokens,), generator=g, device=device)
    ids = torch.randint(VOCABULARY, (tokens, K), generator=g, device=device)
    upstream = torch.randn(tokens, generator=g, device=device)

    def run(count: int) -> tuple[Tensor, Tensor, Tensor]:
        found = SIDES[side](hidden[:count], weight, sampled[:count], ids[:count])
        (found[0] * upstream[:count]).sum().backward()
        return found

    if not side:
        weight.grad = torch.ones_like(weight)
        return peak(device), 0.0
    run(16)  # libraries load
    hidden.grad = weight.grad = None
    gc.collect()
    finish(device)
    started = time.perf_counter()
    found = run(tokens)
    finish(device)
    seconds = time.perf_counter() - started
    used = peak(device)
    for name, value in zip(NAMES, (*found, hidden.grad, weight.grad), strict=True):
        torch.save(value.detach().cpu(), Path(folder) / f"{side}.{name}")
    return used, seconds


def finish(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float:
    """Most bytes held so far."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in KiB


def differences(folder: str) -> dict[str, float]:
    """Largest difference of each result between the sides."""
    found = {}
    for name in NAMES:
        a, b = (torch.load(Path(folder) / f"{side}.{name}").float() for side in SIDES)
        found[name] = float((a - b).abs().max() / a.abs().max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device: str = parser.parse_args().device
    rows: list[dict[str, object]] = []
    spawn = multiprocessing.get_context("spawn")  # a process for each task: its peak is its own
    with (
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as fresh,
        tempfile.TemporaryDirectory() as folder,
    ):

        def case(side: str, tokens: int) -> tuple[float, float]:
            return fresh.submit(measure, side, tokens, device, folder).result()

        tokens = {"cpu": 3072, "cuda": 8192}[device]
        base = case("", 0)[0]
        rounds = [{side: case(side, tokens) for side in SIDES} for _ in range(ROUNDS)]
        apart = fresh.submit(differences, folder).result()
        memory = {side: statistics.median(r[side][0] for r in rounds) - base for side in SIDES}
        for side in SIDES:
            row = {
                "what": side,
                "tokens": tokens,
                "memory_MiB": round(memory[side] / 2**20),
                "memory_ratio": round(memory[side] / memory["full logits"], 3),
                "seconds": round(statistics.median(r[side][1] for r in rounds), 2),
                "time_ratio": round(statistics.median(r[side][1] / r["full logits"][1] for r in rounds), 2),
            }
            rows.append(row | {name: f"{apart[name]:.1e}" for name in NAMES if side == "ours"})
        if device == "cpu":  # full logits would take 13 GiB
            used, seconds = case("ours", 8192)
            memory_8k = round((used - base) / 2**20)
            rows.append({"what": "ours", "tokens": 8192, "memory_MiB": memory_8k, "seconds": round(seconds, 2)})
    path = Path(__file__).with_name(f"memory_{device}.csv")
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path.read_text())


if __name__ == "__main__":
    main()
