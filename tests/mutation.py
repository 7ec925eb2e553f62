"""Deliberate bugs, one at a time: the tests must catch every one. `python tests/mutation.py [word ...]`

Each mutant is a copy of cppo/ and tests/ with one exact replacement; a string that is not found exactly once is an
error, so the list cannot rot. The named test file must then fail with exit code 1 (not merely break at import). First
the unchanged copy must pass. Words choose mutants by name. Exit code 1 unless all are caught.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis.strategies  # noqa: F401
import pydantic  # noqa: F401
import pytest
import yaml  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2

DIVERGENCE_RULES, RATIO, PREFIX = "objectives/divergence.py", "objectives/ratio.py", "objectives/prefix.py"
SEQUENCE, SMOOTH, REGISTRY, TYPES = (f"objectives/{name}.py" for name in ("sequence", "smooth", "registry", "types"))
DIVERGENCES, LOSS, ADVANTAGES, LOGPROBS = "divergences.py", "loss.py", "advantages.py", "models/logprobs.py"

VECTORS, RULES, CONFORMANCE, GOLDEN = (f"test_{name}.py" for name in ("vectors", "objectives", "conformance", "golden"))
DIVERGENCE_TESTS, LOSS_TESTS, ADVANTAGE_TESTS, MODEL_TESTS = (
    f"test_{name}.py" for name in ("divergences", "loss", "advantages", "models")
)
STATISTICS_TESTS, PLUGIN_TESTS, CONFIG_TESTS, BATCH_TESTS, FOLDER_TESTS = (
    f"test_{name}.py" for name in ("statistics", "plugins", "config", "batches", "run_folder")
)


class Mutant(NamedTuple):
    """One bug."""

    name: str
    file: str
    """In cppo/."""
    old: str
    new: str
    tests: str
    """The file in tests/ that must fail."""


MUTANTS = (
    # CPPO and DPPO.
    Mutant("cppo: inclusive S", DIVERGENCE_RULES, "used = exclusive_cumsum(weighted)", "used = weighted.cumsum(-1)", VECTORS),
    Mutant("cppo: inclusive W", DIVERGENCE_RULES, "earlier = exclusive_cumsum(weight)", "earlier = weight.cumsum(-1)", VECTORS),
    Mutant("cppo: D instead of w D in the threshold", DIVERGENCE_RULES,
           "within, affordable = sums.weighted <= cfg.delta, sums.weighted <= sums.threshold",
           "within, affordable = sums.weighted <= cfg.delta, divergence_of(tokens) <= sums.threshold", VECTORS),
    Mutant("cppo: D instead of w D in S", DIVERGENCE_RULES,
           "used = exclusive_cumsum(weighted)", "used = exclusive_cumsum(divergence)", VECTORS),
    Mutant("cppo: W counts tokens, not weights", DIVERGENCE_RULES,
           "earlier = exclusive_cumsum(weight)", "earlier = exclusive_cumsum(mask.to(weight.dtype))", VECTORS),
    Mutant("cppo: only tokens that move away enter S", DIVERGENCE_RULES,
           "used = exclusive_cumsum(weighted)", "used = exclusive_cumsum(torch.where(toward_one(tokens), 0, weighted))",
           VECTORS),
    Mutant("cppo: masked tokens left out of S", DIVERGENCE_RULES, "used = exclusive_cumsum(weighted)",
           "used = exclusive_cumsum(torch.where(toward_one(tokens) | (weighted <= cfg.delta), weighted, 0))", VECTORS),
    Mutant("cppo: threshold not capped at delta", DIVERGENCE_RULES, ".clamp(max=cfg.delta)", "", VECTORS),
    Mutant("cppo: P80 by default", DIVERGENCE_RULES, "quantile: float = 0.9", "quantile: float = 0.8", VECTORS),
    Mutant("cppo: the median, whatever the quantile", DIVERGENCE_RULES,
           "valid.nanquantile(cfg.quantile, dim=-1)", "valid.nanquantile(0.5, dim=-1)", VECTORS),
    Mutant("cppo: padding enters the quantile", DIVERGENCE_RULES,
           "valid = torch.where(mask, divergence, torch.nan)", "valid = torch.where(mask, divergence, 0)", RULES),
    Mutant("cppo: weights rise", DIVERGENCE_RULES, "fraction = (position - 1)", "fraction = (torch.as_tensor(span) - position)",
           VECTORS),
    Mutant("cppo: width instead of own length", DIVERGENCE_RULES,
           "length = mask.sum(-1, keepdim=True)", "length = torch.full_like(mask[:, :1], mask.shape[1], dtype=torch.int64)",
           VECTORS),
    Mutant("cppo: T instead of T - 1", DIVERGENCE_RULES, "/ (torch.as_tensor(span) - 1).clamp(min=1)",
           "/ torch.as_tensor(span)", VECTORS),
    Mutant("cppo: weights fall on beyond the span", DIVERGENCE_RULES, "fraction.clamp(max=1)", "fraction", RULES),
    Mutant("cppo: one weight for a span of one", DIVERGENCE_RULES, "(torch.as_tensor(span) - 1).clamp(min=1)",
           "(torch.as_tensor(span) - 1)", RULES),
    Mutant("cppo: shows D instead of w D", DIVERGENCE_RULES, '"weighted": sums.weighted,',
           '"weighted": sums.threshold,', GOLDEN),
    Mutant("cppo: shows the uncapped threshold twice", DIVERGENCE_RULES, '"threshold": sums.threshold,',
           '"threshold": cfg.delta + sums.allowed - sums.used,', LOSS_TESTS),
    Mutant("cppo: shows a budget where there is none", DIVERGENCE_RULES,
           '    if cfg.delta_b is not None:\n        traces["delta_b"]', '    if True:\n        traces["delta_b"]', LOSS_TESTS),
    Mutant("cppo: a shuffle declares no position", DIVERGENCE_RULES,
           '("divergence", "position") if cfg.shuffle else ("divergence",)', '("divergence",)', LOSS_TESTS),
    Mutant("cppo: columns instead of positions", DIVERGENCE_RULES, "position = mask.cumsum(-1)",
           "position = torch.arange(1, mask.shape[1] + 1).expand_as(mask)", CONFORMANCE),
    Mutant("cppo: no ceiling of delta_b", DIVERGENCE_RULES,
           "delta_b.clamp(cfg.delta_b, cfg.clamp_factor * cfg.delta_b)", "delta_b.clamp(min=cfg.delta_b)", VECTORS),
    Mutant("cppo: no floor of delta_b", DIVERGENCE_RULES,
           "delta_b.clamp(cfg.delta_b, cfg.clamp_factor * cfg.delta_b)",
           "delta_b.clamp(max=cfg.clamp_factor * cfg.delta_b)", RULES),
    Mutant("cppo: soft gate with exclusive S", DIVERGENCE_RULES,
           "(sums.used + sums.weighted) / (cfg.delta + sums.allowed)", "sums.used / (cfg.delta + sums.allowed)", VECTORS),
    Mutant("cppo: soft gate without the budget", DIVERGENCE_RULES,
           "excess = torch.maximum(excess, (sums.used", "excess = torch.minimum(excess, (sums.used", VECTORS),
    Mutant("cppo: causes swapped", DIVERGENCE_RULES,
           "int(Reason.BUDGET), int(Reason.THRESHOLD)", "int(Reason.THRESHOLD), int(Reason.BUDGET)", LOSS_TESTS),
    Mutant("cppo: shuffle ignored", DIVERGENCE_RULES, "        position = tokens.position\n", "", VECTORS),
    Mutant("cppo: strict threshold", DIVERGENCE_RULES, "sums.weighted <= sums.threshold", "sums.weighted < sums.threshold",
           RULES),
    Mutant("dppo: strict threshold", DIVERGENCE_RULES, "(divergence_of(tokens) <= cfg.delta)",
           "(divergence_of(tokens) < cfg.delta)", RULES),
    Mutant("dppo: tokens that move toward one are tested too", DIVERGENCE_RULES,
           "keep = toward_one(tokens) | (divergence", "keep = (divergence", VECTORS),
    Mutant("direction flipped", DIVERGENCE_RULES, "(ratio(tokens).detach() - 1) <= 0", "(ratio(tokens).detach() - 1) >= 0",
           VECTORS),
    Mutant("direction strict at rho = 1", DIVERGENCE_RULES, "(ratio(tokens).detach() - 1) <= 0",
           "(ratio(tokens).detach() - 1) < 0", RULES),
    Mutant("direction by a product that underflows", DIVERGENCE_RULES, "tokens.advantages.sign() * (",
           "tokens.advantages * (", RULES),
    # Rules on the ratio.
    Mutant("ratio upside down", RATIO, "(tokens.logp - tokens.rollout_logp)", "(tokens.rollout_logp - tokens.logp)", VECTORS),
    Mutant("log-ratio not clamped", RATIO, ".clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)", "", RULES),
    Mutant("uncapped ratio detached", RATIO, "return tokens.advantages * rho\n", "return tokens.advantages * rho.detach()\n",
           VECTORS),
    Mutant("capped ratio not detached", RATIO, "rho.detach().clamp(max=cap)", "rho.clamp(max=cap)", VECTORS),
    Mutant("cap ignored", RATIO, "rho.detach().clamp(max=cap)", "rho.detach()", RULES),
    Mutant("clip sides swapped", RATIO, "((advantages > 0) & (rho > 1 + high)) | ((advantages < 0) & (rho < 1 - low))",
           "((advantages > 0) & (rho > 1 + low)) | ((advantages < 0) & (rho < 1 - high))", RULES),
    Mutant("clip whatever the advantage", RATIO, "((advantages > 0) & (rho > 1 + high))", "(rho > 1 + high)", VECTORS),
    Mutant("dual clip for A > 0", RATIO, "((tokens.advantages < 0) & (rho > cfg", "((tokens.advantages > 0) & (rho > cfg",
           RULES),
    Mutant("cispo: weight not detached", RATIO, "return rho.detach().clamp(low, high)", "return rho.clamp(low, high)",
           VECTORS),
    Mutant("cispo: cap without the 1", RATIO, "else 1 + clip_high\n    return rho.detach()",
           "else clip_high\n    return rho.detach()", VECTORS),
    Mutant("minpro: inclusive minimum", PREFIX,
           "before = torch.nn.functional.pad(running[:, :-1], (1, 0), value=torch.inf)", "before = running", VECTORS),
    Mutant("minpro: prefix not capped", PREFIX, "prefix = prefix.clamp(max=0)", "pass", RULES),
    Mutant("minpro: untrained tokens enter the minimum", PREFIX, "torch.where(mask, x, torch.inf).cummin",
           "x.cummin", RULES),
    # Rules on a response.
    Mutant("gspo: sum instead of mean", SEQUENCE, "mean_over(log_ratio(tokens).detach(), tokens.mask)",
           "log_ratio(tokens).detach().sum(-1, keepdim=True)", RULES),
    Mutant("mean over the width", SEQUENCE, "/ mask.sum(-1, keepdim=True).clamp(min=1)", "/ mask.shape[1]", VECTORS),
    Mutant("gmpo: clip sides swapped", SEQUENCE, "torch.where(tokens.advantages > 0, x", "torch.where(tokens.advantages < 0, x",
           RULES),
    Mutant("gmpo: clipped tokens leave the mean unclipped", SEQUENCE, "mean_over(limited.detach()", "mean_over(x.detach()",
           VECTORS),
    Mutant("trm: max by the mean", SEQUENCE, "divergence.amax(-1, keepdim=True) <= cfg.delta_max",
           "mean_over(divergence, mask) <= cfg.delta_max", VECTORS),
    Mutant("trm: either criterion", SEQUENCE, "keep = keep & (mean_over", "keep = keep | (mean_over", VECTORS),
    # Smooth rules.
    Mutant("sapo: taus swapped", SMOOTH, "tokens.advantages > 0, cfg.tau_pos)", "tokens.advantages < 0, cfg.tau_pos)",
           VECTORS),
    Mutant("sapo: no 4 / tau", SMOOTH, "tokens.advantages * 4 / tau * ", "tokens.advantages * 4 * ", VECTORS),
    Mutant("drpo: not weighted by mu", SMOOTH, "tokens.rollout_logp.exp() if cfg.weight_by_mu else 1.0", "1.0", VECTORS),
    Mutant("drpo: penalty without abs(A)", SMOOTH, "tokens.advantages.abs() * scale", "tokens.advantages * scale", VECTORS),
    # What surrounds a rule.
    Mutant("padding not cleaned", TYPES, "return torch.where(mask, value, torch.zeros_like(value))", "return value",
           CONFORMANCE),
    Mutant("half precision kept", TYPES, "value = value.float()", "pass", CONFORMANCE),
    # Divergences.
    Mutant("tv without the half", DIVERGENCES, "return 0.5 * (p - q)", "return (p - q)", VECTORS),
    Mutant("kl from pi to mu", DIVERGENCES, "return (q * ratio)", "return (-p * ratio)", VECTORS),
    Mutant("union and replace swapped", DIVERGENCES, 'if support == "replace":', 'if support == "union":', VECTORS),
    Mutant("replace the likeliest", DIVERGENCES, "q.argmin(-1", "q.argmax(-1", VECTORS),
    Mutant("union adds a token that is there", DIVERGENCES, "torch.where(missing, p_y, 0)], -1)", "p_y], -1)", VECTORS),
    Mutant("no other category", DIVERGENCES, "return _reduced(*_with_other(p, q), kind)", "return _reduced(p, q, kind)",
           VECTORS),
    Mutant("binary drops the other token", DIVERGENCES, "torch.stack([p, 1 - p], -1), torch.stack([q, 1 - q], -1)",
           "torch.stack([p, p], -1), torch.stack([q, 1 - q], -1)", VECTORS),
    Mutant("k3 of the inverse ratio", DIVERGENCES, "torch.expm1(log_ratio) - log_ratio", "torch.expm1(-log_ratio) + log_ratio",
           DIVERGENCE_TESTS),
    Mutant("divergence with a gradient", DIVERGENCES, "@torch.no_grad()\ndef exact", "def exact", DIVERGENCE_TESTS),
    Mutant("divergence in half precision", DIVERGENCES, "return x if x.dtype == torch.float64 else x.float()", "return x",
           DIVERGENCE_TESTS),
    # The reduction.
    Mutant("loss not negated", LOSS, "torch.where(mask, -terms.gate", "torch.where(mask, terms.gate", VECTORS),
    Mutant("gate ignored", LOSS, "-terms.gate * terms.surrogate", "-terms.surrogate", VECTORS),
    Mutant("denominator counts the width", LOSS, "else length.sum())", "else mask.numel())", VECTORS),
    Mutant("seq-mean counts empty rows", LOSS, "(length > 0).sum()", "len(length)", LOSS_TESTS),
    Mutant("seq-mean over columns", LOSS, "per_token.sum(-1) / length.clamp(min=1)", "per_token.mean(-1)", VECTORS),
    Mutant("horizon ignored", LOSS, "denominator = denominator * horizon", "pass", LOSS_TESTS),
    Mutant("token-sum divided", LOSS, 'total if aggregation == "token-sum" else total / denominator', "total / denominator",
           VECTORS),
    Mutant("mask share counts tokens with A = 0", LOSS, "counted = tokens.mask & (tokens.advantages != 0)",
           "counted = tokens.mask", LOSS_TESTS),
    Mutant("mask share counts padding", LOSS, "counted = tokens.mask & (tokens.advantages != 0)",
           "counted = tokens.advantages != 0", LOSS_TESTS),
    Mutant("a cause over its own count", LOSS, '.lower()}"] = (share, count)', '.lower()}"] = (share, share)', LOSS_TESTS),
    Mutant("mean gate over all tokens", LOSS, "float(torch.where(counted, terms.gate, 0).sum())",
           "float(terms.gate.sum())", LOSS_TESTS),
    Mutant("mean divergence over tokens with A != 0", LOSS, "torch.where(tokens.mask, at_least",
           "torch.where(counted, at_least",
           LOSS_TESTS),
    # Advantages.
    Mutant("grpo: biased deviation", ADVANTAGES, "(count - 1).clamp(min=1)\n        centred",
           "count.clamp(min=1)\n        centred", ADVANTAGE_TESTS),
    Mutant("grpo: no epsilon", ADVANTAGES, "EPSILON = 1e-6", "EPSILON = 0.0", ADVANTAGE_TESTS),
    Mutant("dr_grpo divided by the deviation", ADVANTAGES,
           '2503.20783)."""\n    return outcomes.on_tokens(group_relative(outcomes.rewards, outcomes.group, std=False))',
           '2503.20783)."""\n    return outcomes.on_tokens(group_relative(outcomes.rewards, outcomes.group, std=True))',
           ADVANTAGE_TESTS),
    Mutant("unjudged rewards enter the mean as 0", ADVANTAGES, "count = judged.sum(-1, keepdim=True)", "count = group",
           ADVANTAGE_TESTS),
    Mutant("rloo: no factor", ADVANTAGES, "on_tokens((factor * centred)", "on_tokens((centred)", ADVANTAGE_TESTS),
    Mutant("rloo: G over G", ADVANTAGES, "outcomes.rewards.dtype) / (count - 1).clamp(min=1)",
           "outcomes.rewards.dtype) / count.clamp(min=1)", ADVANTAGE_TESTS),
    Mutant("gpg: counts zeros", ADVANTAGES, "((rewards != 0) & judged)", "judged", ADVANTAGE_TESTS),
    Mutant("gae without lambda", ADVANTAGES, "delta + gamma * gae_lambda * next_advantage", "delta + gamma * next_advantage",
           ADVANTAGE_TESTS),
    Mutant("gae without the next value", ADVANTAGES, " + gamma * next_value - values", " - values", ADVANTAGE_TESTS),
    Mutant("gae: holes end a response", ADVANTAGES, "torch.where(valid, advantage, next_advantage)",
           "torch.where(valid, advantage, 0)", ADVANTAGE_TESTS),
    Mutant("whitening biased", ADVANTAGES, "centred.square().sum() / (count - 1).clamp(min=1)",
           "centred.square().sum() / count.clamp(min=1)", ADVANTAGE_TESTS),
    Mutant("whitening over padding", ADVANTAGES, "count = mask.sum()\n", "count = torch.tensor(mask.numel())\n",
           ADVANTAGE_TESTS),
    Mutant("reward at the first token", ADVANTAGES, "(order == order[:, -1:])", "(order == 1)", ADVANTAGE_TESTS),
    Mutant("gae ignores the discount", ADVANTAGES, "outcomes.mask, outcomes.gamma, outcomes.gae_lambda",
           "outcomes.mask, 1.0, outcomes.gae_lambda", ADVANTAGE_TESTS),
    Mutant("gae whitened over unjudged rows too", ADVANTAGES, "whiten(raw, outcomes.judged)", "whiten(raw, outcomes.mask)",
           ADVANTAGE_TESTS),
    Mutant("advantages outside the mask", ADVANTAGES, "(torch.where(outcomes.mask, part, 0) for part in parts)",
           "parts", ADVANTAGE_TESTS),
    Mutant("advantages of any shape", ADVANTAGES, "if shapes != [", "if False and shapes != [", ADVANTAGE_TESTS),
    Mutant("advantages that are not finite", ADVANTAGES, "if not bool(advantages.isfinite().all()):", "if False:",
           ADVANTAGE_TESTS),
    # The registries: needs, traces, estimators.
    Mutant("a missing need is not refused", REGISTRY, "if getattr(tokens, need) is None:", "if False:", LOSS_TESTS),
    Mutant("unknown needs are registered", REGISTRY, "if not callable(fixed) and not set(fixed) <= NEEDS.keys():", "if False:",
           LOSS_TESTS),
    Mutant("undeclared traces are shown", REGISTRY, "if name not in self.spec.traces:", "if False:", LOSS_TESTS),
    Mutant("traces of any shape", REGISTRY, "if trace.shape not in (mask.shape, mask.shape[:1]):", "if False:", LOSS_TESTS),
    Mutant("terms of any shape", REGISTRY, "            if shape != mask.shape:", "            if False:", LOSS_TESTS),
    Mutant("traces with a gradient", REGISTRY, "else rows, trace.detach(), 0)", "else rows, trace, 0)", LOSS_TESTS),
    Mutant("traces outside the mask", REGISTRY, "torch.where(mask if trace.dim() == 2 else rows, trace.detach(), 0)",
           "trace.detach()", LOSS_TESTS),
    Mutant("traces of empty responses", REGISTRY, "mask if trace.dim() == 2 else rows,",
           "mask if trace.dim() == 2 else torch.ones_like(rows),", LOSS_TESTS),
    Mutant("a trace's mean over all rows", LOSS, "rows = float(tokens.mask.any(-1).sum())", "rows = float(len(tokens.mask))",
           LOSS_TESTS),
    Mutant("traces by token as metrics", LOSS, "if trace.dim() == 1}", "}", LOSS_TESTS),
    Mutant("a component over the whole denominator", LOSS, "    if denominator is None:\n        denominator = max(",
           "    if True:\n        denominator = max(", LOSS_TESTS),
    Mutant("a loss a thousandth too large", LOSS, "else total / denominator", "else 1.001 * total / denominator", GOLDEN),
    Mutant("estimators with a gradient", DIVERGENCES, "self.function(seen, kind, **options).detach()",
           "self.function(seen, kind, **options)", DIVERGENCE_TESTS),
    Mutant("divergences of any shape", DIVERGENCES, ".shape != seen.logp.shape:", ".shape == ():", DIVERGENCE_TESTS),
    Mutant("pi and mu swapped for top_k", DIVERGENCES, "        seen.topk_logp,\n        seen.rollout_topk_logp,",
           "        seen.rollout_topk_logp,\n        seen.topk_logp,", DIVERGENCE_TESTS),
    Mutant("pi and mu swapped for binary", DIVERGENCES, "return binary(seen.logp, seen.rollout_logp, kind)",
           "return binary(seen.rollout_logp, seen.logp, kind)", DIVERGENCE_TESTS),
    Mutant("pi and mu swapped in what was recorded", "training/batches.py", "topk_logp=now.topk_logp,",
           "topk_logp=part.topk_logp,", GOLDEN),
    Mutant("the option of an estimator is lost", "training/batches.py",
           '{} if divergence.support is None else {"support": divergence.support}', "{}", GOLDEN),
    Mutant("sampled-token losses with missing needs", "integrations/__init__.py",
           "sorted(rule.objective.needs - {\"divergence\"})", "sorted(set())", LOSS_TESTS),
    Mutant("a module's comments count", "system/plugins.py", "node.body = statements or [ast.Pass()]", "pass", PLUGIN_TESTS),
    Mutant("a module's code does not count", "system/plugins.py", "ast.unparse(tree).encode()", "b''", PLUGIN_TESTS),
    Mutant("a later key is always hashed", "suite/schema.py",
           "(LATER in field.metadata and at_default)", "False", CONFIG_TESTS),
    Mutant("a later key is never hashed", "suite/schema.py",
           "(LATER in field.metadata and at_default)", "LATER in field.metadata",
           CONFIG_TESTS),
    # Rollouts, models and folders.
    Mutant("rows cut to the number of trained tokens", "rollout/types.py",
           "width = int(trained.max()) + 1 if len(trained) else 1", "width = max(int(self.mask[index].sum(-1).max()), 1)",
           BATCH_TESTS),
    Mutant("any head is loaded", "models/load.py", "    check_head(model, folder)\n", "", MODEL_TESTS),
    Mutant("a head's probe with small logits", "models/load.py", "lambda module, inputs, output: output * factor",
           "lambda module, inputs, output: output", MODEL_TESTS),
    Mutant("work of another numerics version is continued", "results/run_folder.py",
           "if version in (None, str(NUMERICS_VERSION)):", "if True:", FOLDER_TESTS),
    Mutant("work from before versions were counted is continued", "results/run_folder.py", 'before.get("numerics", "0")',
           'before.get("numerics")', FOLDER_TESTS),
    # Scores.
    Mutant("scores weighted by a benchmark's size", "statistics.py",
           "by_benchmark(correct, samples, benchmark).mean(axis=-1)", "by_benchmark(correct, samples).mean(axis=-1)",
           STATISTICS_TESTS),
    Mutant("unjudged problems count as wrong", "statistics.py", "known = (judged > 0) @", "known = np.ones_like(judged) @",
           STATISTICS_TESTS),
    # Log-probabilities of tokens.
    Mutant("statistics: no temperature in the gradient", LOGPROBS, "            to_logits.div_(ctx.temperature)\n", "",
           MODEL_TESTS),
    Mutant("statistics: the head's gradient is the last chunk's", LOGPROBS,
           "to_head.addmm_(to_logits.T, hidden[part].float())", "to_head.copy_(to_logits.T @ hidden[part].float())",
           MODEL_TESTS),
    Mutant("statistics: entropy of the wrong sign", LOGPROBS, "-logp.exp().mul_(logp).sum(-1)", "logp.exp().mul_(logp).sum(-1)",
           MODEL_TESTS),
    Mutant("statistics: logits in the model's precision", LOGPROBS, "torch.nn.functional.linear(hidden.float(), head)",
           "torch.nn.functional.linear(hidden, head.to(hidden.dtype)).float()", MODEL_TESTS),
)  # fmt: skip


def tested(folder: Path, tests: tuple[str, ...]) -> int:
    """pytest's exit code for test files of a copy, in a fork that has not imported cppo yet; output in `folder`/log."""
    sys.stdout.flush()
    child = os.fork()  # a fork shares the imports below, which take longer than the tests
    if child == 0:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.path[:] = [str(folder), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests"))]
        sys.dont_write_bytecode = True
        paths = [str(folder / "tests" / name) for name in tests]
        options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:anyio"]
        code = pytest.main([*options, *paths])
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


IN_A_COPY = """
import cppo
from hypothesis import Phase

assert cppo.__file__.startswith({folder!r}), cppo.__file__
settings.register_profile("mutation", settings.get_profile("deterministic"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutation")  # a failure is enough, nobody reads the smallest one
"""


def copied(folder: Path) -> None:
    """cppo/ and tests/, without compiled files."""
    for name in ("cppo", "tests", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pytest.ini").write_text("[pytest]\n")
    conftest = folder / "tests" / "conftest.py"
    conftest.write_text(conftest.read_text() + IN_A_COPY.format(folder=str(folder)))


def verdict(mutant: Mutant) -> str:
    """ "caught", or what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copied(folder)
        path = folder / "cppo" / mutant.file
        source = path.read_text()
        if source.count(mutant.old) != 1:
            return f"STALE: found {source.count(mutant.old)} times in cppo/{mutant.file}: {mutant.old!r}"
        path.write_text(source.replace(mutant.old, mutant.new))
        code = tested(folder, (mutant.tests,))
        log = (folder / "log").read_text()
    if code == 0:
        return f"SURVIVED {mutant.tests}"
    return "caught" if code == 1 else f"BROKEN: pytest exit code {code}\n{log[-2000:]}"


def main(words: list[str]) -> int:
    """0 if every chosen mutant is caught."""
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copied(folder)
        if tested(folder, tuple(sorted({m.tests for m in chosen}))) != 0:
            print(f"the unchanged copy fails:\n{(folder / 'log').read_text()[-3000:]}")
            return 1
    print(f"unchanged copy passes ({time.monotonic() - start:.0f} s)", flush=True)
    caught = 0
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        for mutant, found in zip(chosen, pool.imap(verdict, chosen), strict=True):
            caught += found == "caught"
            print(f"{found:8} {mutant.name}", flush=True)
    print(f"{caught} of {len(chosen)} mutants caught in {time.monotonic() - start:.0f} s")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
