"""Trainer verl without verl: what is refused when a suite is loaded, what the command says, how it reaches several nodes.

That verl accepts and means the command is tested beside verl itself, in `test_verl_launch.py`.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import BINARY_TV, ROOT, run_of, verl_suite

from cppo.__main__ import main
from cppo.integrations import verl_command, verl_launch
from cppo.models.create import create_tokenizer
from cppo.results.run_folder import RunFolder
from cppo.suite.setting import Resources
from cppo.suite.suite import load_suite
from cppo.system.interrupts import Interrupted
from cppo.tasks.types import SPECIAL, problem
from cppo.training.batches import problem_order

CPPO = {"name": "cppo", "objective": "cppo", "divergence": BINARY_TV}
SETTING = "settings.moe"
REFUSED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"scale": {"sharding": "ddp"}}, {}, {}, f"{SETTING}.scale.sharding: ddp is not for trainer verl"),
    (
        {"scale": {"sharding": "megatron", "precision": "float32"}},
        {},
        {},
        f"{SETTING}.scale.precision: megatron computes in bfloat16",
    ),
    ({"scale": {"engine_gpus": 2}}, {}, {}, f"{SETTING}.scale.engine_gpus: verl's vLLM shares"),
    ({"scale": {"tensor_parallel": 3}}, {}, {}, f"{SETTING}.scale.tensor_parallel: 3 does not divide the 8 GPUs"),
    ({"scale": {"micro_rows": 3}}, {}, {}, f"{SETTING}.scale.micro_rows: 3 does not divide a rank's 8 responses"),
    (
        {"scale": {"trainer": "builtin", "sharding": "megatron"}},
        {},
        {},
        f"{SETTING}.scale: sharding: megatron is only for",
    ),
    ({"scale": {"engine": "verl"}}, {}, {}, f"{SETTING}.scale: engine: verl is a trainer, not an engine"),
    ({"rollout": {"resample": 1}}, {}, {}, f"{SETTING}.rollout.resample: verl's dynamic sampling has no limit"),
    ({"optimizer": {"warmup_updates": 5}}, {}, {}, f"{SETTING}.optimizer.warmup_updates: 5 is not a multiple of the 2"),
    ({}, {"gpus": 0}, {}, "resources.moe.gpus: trainer verl needs at least 1"),
    ({}, {"cpus": 31}, {}, "resources.moe.cpus: verl needs at least 4 for each GPU"),
    ({}, {"nodes": 5}, {}, "resources.moe.gpus: 40 data-parallel ranks do not divide the 256 responses"),
    ({}, {}, {"anchor": "recomputed"}, "rules.cppo.anchor: recomputed is not for trainer verl"),
    ({}, {}, {"anchor": "decoupled"}, "rules.cppo.anchor: decoupled is not for trainer verl"),
    (
        {},
        {},
        {"divergence": {"estimator": "top_k", "kind": "tv", "k": 20}},
        "rules.cppo.divergence.estimator: top_k is not for trainer verl, which records the sampled token's",
    ),
    ({}, {}, {"params": {"shuffle": True}}, "rules.cppo.objective: needs position with these params"),
]


@pytest.mark.parametrize(("setting", "resources", "entry", "message"), REFUSED, ids=[r[3] for r in REFUSED])
def test_refused_when_the_suite_is_loaded(
    setting: dict[str, Any], resources: dict[str, Any], entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        verl_suite(tmp_path, setting, resources, [{**CPPO, **entry}])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_divergence_for_one_setting(tmp_path: Path) -> None:
    """A suite compares settings of several trainers: where verl trains, `params_by_setting` names a divergence that it has."""
    top = {"estimator": "top_k", "kind": "tv", "k": 20}
    entry = {**CPPO, "divergence": top, "params_by_setting": {"moe": {"delta": 0.2, "divergence": BINARY_TV}}}
    run = verl_suite(tmp_path, rules=[entry]).runs()[0]
    plain = verl_suite(tmp_path, rules=[{**CPPO, "params": {"delta": 0.2}}]).runs()[0]
    assert run.id == plain.id and run.rule.divergence is not None and run.rule.divergence.k is None
    with pytest.raises(ValueError, match=r"rules\.cppo\.params_by_setting\.moe\.divergence\.kind: "):
        verl_suite(
            tmp_path, rules=[{**entry, "params_by_setting": {"moe": {"divergence": {**BINARY_TV, "kind": "x"}}}}]
        )


def test_every_objective_renders(tmp_path: Path) -> None:
    suite = verl_suite(tmp_path)
    for run in suite.runs():
        words = verl_command.command(run, suite.resources["moe"], tmp_path / "base", tmp_path / "run")
        assert words[:3] == [sys.executable, "-m", "verl.trainer.main_ppo"]
        keys = [word.partition("=")[0] for word in words[3:]]
        assert len(set(keys)) == len(keys) and all("\n" not in word for word in words)


def test_the_papers_largest_setting_renders(tmp_path: Path) -> None:
    """Every rule of config/paper.yaml on Qwen3-30B-A3B-Base, with Table 3's numbers; checking it needs no transformers."""
    suite = load_suite(ROOT / "config" / "paper.yaml")
    runs = [run for run in suite.runs() if run.setting.trainer == "verl"]
    assert {run.rule_name for run in runs} == {entry.name for entry in suite.rules}
    for run in runs:
        resources = suite.resources[run.setting_name]
        found = verl_command.overrides(run, resources, tmp_path / "base", tmp_path / "run")
        assert run.setting.engine == "vllm", "the engine that scores the checkpoints"
        rollout = (found["data.train_batch_size"], found["actor_rollout_ref.rollout.n"])
        assert (*rollout, found["actor_rollout_ref.actor.ppo_mini_batch_size"]) == (256, 16, 32)
        assert found["actor_rollout_ref.actor.loss_scale_factor"] == found["data.max_response_length"] == 16384
        assert (found["trainer.nnodes"], found["trainer.n_gpus_per_node"]) == (4, 8)
        if run.rule_name in ("cppo", "dppo"):
            assert found["+actor_rollout_ref.actor.policy_loss.params"]["delta"] == 0.2
    code = "import sys; from cppo.suite.suite import load_suite; load_suite(sys.argv[1]); print('transformers' in sys.modules)"
    suite_file = str(ROOT / "config" / "paper.yaml")
    done = subprocess.run([sys.executable, "-c", code, suite_file], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_only_the_objective_differs_between_two_rules(tmp_path: Path) -> None:
    """Data, seeds and everything else are the same for every rule; two seeds differ."""
    suite = verl_suite(tmp_path)

    def chosen(rule: str, seed: int = 0) -> dict[str, Any]:
        run = run_of(suite, rule, seed)
        return verl_command.overrides(run, suite.resources["moe"], tmp_path / "base", tmp_path / "run")

    grpo, gpg = chosen("grpo"), chosen("gpg")
    differ = {key for key in grpo if grpo[key] != gpg[key]}
    assert differ == {
        "actor_rollout_ref.actor.policy_loss.loss_mode",
        "+actor_rollout_ref.actor.policy_loss.params",
        "trainer.experiment_name",
    }
    seeds = [chosen("grpo", seed)["actor_rollout_ref.rollout.seed"] for seed in (0, 1)]
    assert abs(seeds[0] - seeds[1]) > 1000 and all(0 <= s < 2**31 for s in seeds)


def test_render_prints_the_command_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = verl_suite(tmp_path)
    run = run_of(suite, "cppo")
    where = ["--suite", str(tmp_path / "suite.yaml"), "--root", str(tmp_path / "runs")]
    assert main(["render", *where, "--run", run.id]) == 0
    words = shlex.split(capsys.readouterr().out)
    base, folder = tmp_path / "runs" / run.base.folder / "checkpoints" / "iteration-0", tmp_path / "runs" / run.folder
    assert words == verl_command.command(run, suite.resources["moe"], base, folder)
    assert not (tmp_path / "runs").exists()


def test_render_is_for_trainer_verl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = verl_suite(tmp_path, {"scale": {"trainer": "builtin"}}, rules=[CPPO])
    assert main(["render", "--suite", str(tmp_path / "suite.yaml"), "--run", suite.runs()[0].id]) == 2
    assert "setting moe does not have trainer verl" in capsys.readouterr().err


def test_several_nodes_through_slurm_or_a_cluster_that_runs() -> None:
    words, four = ["/env/bin/python", "-m", "verl.trainer.main_ppo", "a=b"], Resources(gpus=8, nodes=4, cpus=64)
    assert verl_command.on_cluster(words, Resources(gpus=8), {}) == words
    assert verl_command.on_cluster(words, four, {"RAY_ADDRESS": "head:6379", "SLURM_JOB_ID": "1"}) == words
    with pytest.raises(ValueError, match=r"resources\.nodes: 4 nodes need a Slurm job .* or a Ray cluster"):
        verl_command.on_cluster(words, four, {})
    started = verl_command.on_cluster(words, four, {"SLURM_JOB_ID": "1"})
    assert started[0] == "srun" and {"--nodes=4", "--ntasks=4", "--ntasks-per-node=1"} <= set(started)
    ray = started[started.index("/env/bin/ray") :]
    assert (
        ray[1] == "symmetric-run" and ray[ray.index("--min-nodes") + 1] == "4" and ray[ray.index("--") + 1 :] == words
    )


def test_prompts_are_those_of_every_other_engine(tmp_path: Path) -> None:
    """Row i of the parquet is the i-th prompt of the run in `problem_order`, over more than one epoch."""
    changes = {"iterations": 3, "checkpoint_every": 1, "rollout": {"prompts": 4, "minibatch": 4}}
    run = verl_suite(tmp_path, changes, {"gpus": 4, "nodes": 1}, [CPPO]).runs()[1]
    problems = tuple(problem(f"What is {i}+1?", str(i + 1), "train", 1) for i in range(5))
    verl_launch.write_prompts(run, problems, tmp_path / "train.parquet")
    rows = pd.read_parquet(tmp_path / "train.parquet")
    order = [i for draw in range(3) for i in problem_order(5, 4, draw, "moe", run.seed)]
    assert [row["ground_truth"] for row in rows["reward_model"]] == [str(i + 1) for i in order]
    for i, prompt in zip(order, rows["prompt"], strict=True):
        (message,) = prompt
        assert message == {"role": "user", "content": f"What is {i}+1?\nPut the final answer in \\boxed{{}}."}
    assert [extra["index"] for extra in rows["extra_info"]] == list(range(12))


def logged(step: int, **changes: Any) -> str:
    """A line as verl's file logger writes it, of an iteration whose numbers contain its own."""
    data = {
        "critic/score/mean": step / 10,
        "response_length/mean": 100.0 + step,
        "response_length/max": 8192.0 if step == 2 else 500.0,
        "response_length/clip_ratio": 0.125,
        "actor/loss": -0.5 * step,
        "actor/grad_norm": 0.25 * step,
        "actor/cppo_bench/mask_share": 0.9,  # an average of averages, not to be used
        "actor/cppo_bench/mask_share_sum": 3.0 * step,
        "actor/cppo_bench/mask_share_count": 60.0,
        "actor/cppo_bench/divergence_sum": 0.0,
        "actor/cppo_bench/divergence_count": 0.0,
        "timing_s/gen": 20.0,
        "timing_s/update_actor": 10.0,
        "timing_s/adv": 0.5,
        "timing_s/step": 40.0,
        "perf/throughput": 123.0,
        **changes,
    }
    return json.dumps({"step": step, "data": data}) + "\n"


def small_run(tmp_path: Path, **changes: Any) -> Any:
    plan = {"iterations": 3, "checkpoint_every": 1, **changes}
    run = verl_suite(tmp_path, plan, rules=[CPPO]).runs()[0]
    folder = tmp_path / "run"
    (folder / "verl").mkdir(parents=True)
    return run, folder


def test_collected_metrics_timings_and_status(tmp_path: Path) -> None:
    """Two attempts: the second repeats iteration 2, which the first had logged but not saved, and then died in a line."""
    run, folder = small_run(tmp_path)
    (folder / "verl" / "log-0.jsonl").write_text(logged(1) + logged(2, **{"critic/score/mean": 9.0}) + logged(3)[:40])
    (folder / "verl" / "log-1.jsonl").write_text(logged(2) + logged(3))
    verl_launch.collect(run, RunFolder(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert [row["reward"] for row in rows] == [row["accuracy"] for row in rows] == [0.1, 0.2, 0.3]
    assert [row["mask_share"] for row in rows] == [3 / 60, 6 / 60, 9 / 60] and rows[0]["divergence"] is None
    assert [row["truncated"] for row in rows] == [0.0, 0.125, 0.0]
    assert [row["loss"] for row in rows] == [-0.5, -1.0, -1.5] and "value_loss" not in rows[0]
    times = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    assert times[1] == {
        "iteration": 2,
        "tokens": 102 * 512,
        "rollout": 20.0,
        "advantage": 0.5,
        "update": 10.0,
        "total": 40.0,
        "rollout_tokens_per_second": 102 * 512 / 20,
        "update_tokens_per_second": 102 * 512 / 10,
    }
    assert json.loads((folder / "DONE").read_text()) == {"iterations": 3, "collapsed_at": None}
    assert (folder / "positions.jsonl").read_text() == (folder / "tokens.jsonl").read_text() == ""


def test_missing_iterations_are_no_finished_run(tmp_path: Path) -> None:
    run, folder = small_run(tmp_path)
    (folder / "verl" / "log-0.jsonl").write_text(logged(1) + logged(3))
    with pytest.raises(ValueError, match="verl logged no iteration 2 of 3"):
        verl_launch.collect(run, RunFolder(folder))
    assert not (folder / "DONE").exists()


def test_shaped_rewards_are_no_accuracy(tmp_path: Path) -> None:
    run, _ = small_run(tmp_path, rollout={"overlong_buffer": 512})
    found = verl_launch.metrics(run, json.loads(logged(1))["data"])
    assert "accuracy" not in found and found["reward"] == 0.1


@pytest.mark.parametrize(
    ("norms", "expected"),
    [([1.0, None, None, None, 2.0], 4), ([1.0, None, None, 2.0, None, None], None), ([None] * 3, 3), ([2.0] * 9, None)],
)
def test_collapse_counts_updates(norms: list[float | None], expected: int | None, tmp_path: Path) -> None:
    """collapse_after is 5 updates and a rollout has 2: three iterations."""
    run, _ = small_run(tmp_path)
    assert verl_launch.collapse(run, norms) == expected


@pytest.mark.parametrize("layout", ["actor/huggingface", "actor/model/huggingface"])
def test_weights_outlive_verls_states(layout: str, tmp_path: Path) -> None:
    weights = tmp_path / "verl" / "global_step_20" / layout
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    verl_launch.keep_weights(tmp_path)
    assert not (tmp_path / "checkpoints").exists(), "no weights yet"
    (weights / "model.safetensors").write_text("weights")
    verl_launch.keep_weights(tmp_path)
    kept = tmp_path / "checkpoints" / "iteration-20" / "model.safetensors"
    assert os.stat(kept).st_ino == os.stat(weights / "model.safetensors").st_ino, "no second copy on the disk"
    (weights / "model.safetensors").unlink()
    verl_launch.keep_weights(tmp_path)
    assert kept.read_text() == "weights"


def test_an_environment_without_verl_is_one_line(tmp_path: Path) -> None:
    for python, reason in [(str(tmp_path / "none"), "No such file"), (sys.executable, "vllm")]:
        with pytest.raises(ValueError) as caught:
            verl_launch.installed(python)
        assert "CPPO_VERL_PYTHON" in str(caught.value) and "\n" not in str(caught.value)
        if python != sys.executable:
            assert reason in str(caught.value)


def test_train_asks_for_verl_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(verl_suite(tmp_path, {"task": {"prompt": "base"}}), "cppo")
    root = tmp_path / "runs"
    create_tokenizer((*SPECIAL, "1", "+", "?")).save_pretrained(root / run.base.folder / "checkpoints" / "iteration-0")
    made = problem("1+1?", "2", "train", 1)
    (root / run.base.data).mkdir(parents=True)
    (root / run.base.data / "train.jsonl").write_text(json.dumps(made.__dict__) + "\n")
    monkeypatch.setenv("CPPO_VERL_PYTHON", str(tmp_path / "nowhere"))
    assert main(["train", "--suite", str(tmp_path / "suite.yaml"), "--root", str(root), "--run", run.id]) == 2
    assert "trainer verl needs verl 0.9.1" in capsys.readouterr().err
    assert list((root / run.folder).iterdir()) == []


def test_sigterm_ends_verl(tmp_path: Path) -> None:
    """Passed on to the command; the caller learns that the run can be continued."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        verl_launch._watch(["sleep", "60"], tmp_path)


def test_a_ray_cluster_of_our_own_has_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one for each start, in the environment that srun hands to every node."""
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> {tmp_path}/seen\n')
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for _ in range(2):
        verl_launch._watch(["srun"], tmp_path)
    first, second = (tmp_path / "seen").read_text().split("\n")[:2]
    assert first.startswith("token ") and len(first) == 70 and first != second


def test_seeds_of_a_setting_do_not_depend_on_torchs_state(tmp_path: Path) -> None:
    suite = verl_suite(tmp_path, rules=[CPPO])
    words = []
    for state in (0, 1):
        torch.manual_seed(state)
        words.append(verl_command.command(suite.runs()[0], suite.resources["moe"], tmp_path, tmp_path))
    assert words[0] == words[1]
