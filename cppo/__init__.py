"""cppo: trust-region rules for language-model reinforcement learning, and the benchmark that compares them.

What it is: objectives as pure functions (`cppo.objectives`), one reduction (`cppo.loss`), divergences
(`cppo.divergences`) and everything needed to train and score small causal language models with them.
What it leaves out: distributed engines of its own; those are accelerate, vLLM and verl.

Imports point only backwards in this order: presets, config, hub, seeds, files, interrupts, lock, problems, policy,
prompts, distributed, rollout, rewards, datasets, advantages, divergences, objectives, loss, laws, diagnostics, critic,
batches, checkpoint, provenance, train, base, lm_task, evaluate, statistics, theory, tables, plan, trace, docs,
integrations, __main__.
"""

__version__ = "0.1.0"
