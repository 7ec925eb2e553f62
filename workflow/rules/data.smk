# Problems, lm-eval tasks and base models: one of each per setting.


rule data:
    output:
        "runs/data/{setting}/{data}/train.jsonl",
    log:
        "runs/logs/data/{setting}-{data}.log",
    benchmark:
        "runs/benchmarks/data/{setting}-{data}.tsv"
    conda:
        ENVIRONMENT
    resources:
        cpus_per_task=1,
        mem_mb=lambda w, attempt: 4000 * attempt,
        runtime=lambda w, attempt: 60 * attempt,
    params:
        numerics=NUMERICS_VERSION,  # problems are drawn by seed, which a change of numerics may concern
    shell:
        "python -m cppo data --suite $CPPO_SUITE --setting {wildcards.setting} 2> >(tee {log} >&2)"


rule base:
    input:
        data=lambda w: f"runs/{suite().base(w.setting).data}/train.jsonl",
    output:
        f"runs/base/{{setting}}/{{base}}/{DONE}",
    log:
        "runs/logs/base/{setting}-{base}.log",
    benchmark:
        "runs/benchmarks/base/{setting}-{base}.tsv"
    conda:
        ENVIRONMENT
    resources:
        cpus_per_task=lambda w: share(w).cpus,
        mem_mb=lambda w, attempt: ceil(1000 * share(w).memory_gb) * attempt,
        runtime=lambda w, attempt: ceil(60 * share(w).hours) * attempt,
    params:
        numerics=NUMERICS_VERSION,
    shell:
        "python -m cppo base --suite $CPPO_SUITE --setting {wildcards.setting} --restart-outdated"
        " 2> >(tee {log} >&2)"
