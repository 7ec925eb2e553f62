# Scores: lm-eval over all checkpoints of a run, or over a base model.


rule evaluate:
    input:
        f"runs/train/{{rule}}/{{run}}/{DONE}",
    output:
        f"runs/train/{{rule}}/{{run}}/{SCORES}",
    log:
        "runs/logs/evaluate/{rule}-{run}.log",
    benchmark:
        "runs/benchmarks/evaluate/{rule}-{run}.tsv"
    conda:
        ENVIRONMENT
    resources:
        gpu=lambda w: share(w).gpus or None,
        cpus_per_task=lambda w: share(w).cpus,
        mem_mb=lambda w, attempt: ceil(1000 * share(w).memory_gb) * attempt,
        runtime=lambda w, attempt: ceil(60 * share(w).evaluate_hours) * attempt,
    params:
        numerics=NUMERICS_VERSION,
    shell:
        "python -m cppo evaluate $(dirname {input}) 2> >(tee {log} >&2)"


rule evaluate_base:
    input:
        f"runs/base/{{setting}}/{{base}}/{DONE}",
    output:
        f"runs/base/{{setting}}/{{base}}/{SCORES}",
    log:
        "runs/logs/evaluate/base-{setting}-{base}.log",
    benchmark:
        "runs/benchmarks/evaluate/base-{setting}-{base}.tsv"
    conda:
        ENVIRONMENT
    resources:
        gpu=lambda w: share(w).gpus or None,
        cpus_per_task=lambda w: share(w).cpus,
        mem_mb=lambda w, attempt: ceil(1000 * share(w).memory_gb) * attempt,
        runtime=lambda w, attempt: ceil(60 * share(w).evaluate_hours) * attempt,
    params:
        numerics=NUMERICS_VERSION,
    shell:
        "python -m cppo evaluate $(dirname {input}) 2> >(tee {log} >&2)"
