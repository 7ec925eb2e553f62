"""cppo: trust-region rules for language-model reinforcement learning, and the benchmark that compares them.

What it is: objectives as pure functions (`cppo.objectives`), one reduction (`cppo.loss`), divergences (`cppo.divergences`),
advantages (`cppo.advantages`), and everything needed to train and score small causal language models with them.
What it leaves out: distributed engines of its own; those are accelerate, vLLM and verl.

Data flow one way, and so do imports: a module imports only from what stands before it in this list, or from its own entry.
A room whose files serve different layers is listed in parts.

    system                    atomic files, locks, signals, the hub, named seeds, registries
    numerics                  which numbers this code makes
    divergences               D_t: how far pi has moved from mu at a token
    objectives                the rules: pure functions from Tokens to Terms
    loss                      the only reduction
    objectives.laws           what every objective must keep
    advantages                rewards to A_t
    diagnostics               what is measured of an update
    statistics                intervals and probabilities of improvement
    theory                    the paper's bounds, by enumeration
    theory_search             policies that come closest to a bound
    suite.schema              frozen, checked, hashed configuration
    suite.yaml_file           YAML from a stranger
    suite.presets             named rules
    rewards                   verdicts on answers
    rollout.engines           which engines there are
    tasks                     task families: problems, prompts, verification
    suite.setting             types of a setting
    suite.config              types of rules and runs
    models                    models: created, loaded, asked for log-probabilities
    rollout                   responses sampled from mu
    results.run_folder        what a run leaves behind
    results.checkpoint        training states
    results.provenance        code and packages
    results.columns           columns of tables, and how a table is read
    training                  batches, updates, base models
    evaluation                scores, through lm-eval
    integrations              the objectives inside TRL and verl; the verl command of a run
    suite.suite               suites: loaded, resolved, checked
    suite.cost                what a suite costs
    results.tables            a suite's tables
    results.audit             from a number back to what made it
    integrations.verl_launch  runs that verl trains
    integrations.verl         the objectives as verl's policy losses
    render_docs               docs/objectives.md
    __main__                  the command line
"""

__version__ = "0.1.0"
