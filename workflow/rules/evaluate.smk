# Scores: lm-eval over all checkpoints of a run, or over a base model.

# All baselines, for commands that see the whole suite. Not a param: adding one must not score the other runs again.
BASELINE_ARGS = " ".join("--baseline " + shlex.quote(entry) for entry in BASELINES)


rule evaluate:
    input:
        "runs/train/{label}/{run}/DONE",
    output:
        "runs/train/{label}/{run}/scores.csv",
    log:
        "runs/logs/evaluate/{label}-{run}.log",
    benchmark:
        "runs/benchmarks/evaluate/{label}-{run}.tsv"
    conda:
        "../../environment.yml"
    shell:
        "python -m cppo evaluate --suite {SUITE_FILE} {BASELINE_ARGS} --run {wildcards.run} 2> >(tee {log} >&2)"


rule evaluate_base:
    input:
        "runs/base/{setting}/{base}/DONE",
    output:
        "runs/base/{setting}/{base}/scores.csv",
    log:
        "runs/logs/evaluate/base-{setting}-{base}.log",
    benchmark:
        "runs/benchmarks/evaluate/base-{setting}-{base}.tsv"
    conda:
        "../../environment.yml"
    shell:
        "python -m cppo evaluate --suite {SUITE_FILE} --setting {wildcards.setting} 2> >(tee {log} >&2)"
