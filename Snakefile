"""The studies' runs as jobs: plan, run, plan again until nothing is missing, then notebooks, figures, tables and the PDF.

    snakemake -j2                                       # here, two jobs at once (timings then suffer)
    snakemake -j2 --config studies=lab4_grid scale=full
    snakemake --profile profiles/slurm --config scale=gpu gpu=A100-80GB machine="NVIDIA A100-SXM4-80GB"

Which runs there are depends on what earlier ones say, so plans are checkpoints: round n is made when all that the rounds
before it asked for has a record. What a job asks of a scheduler (`mem_mb`, `gpu`, `gpu_mem_mb`, `runtime`) is predicted with the plan.
"""

import itertools
import json
import os
import shlex
import sys
from pathlib import Path

from memstudy import records

from memstudy import project
from memstudy.profiler import find_gpu

SCALE = config.get("scale", "quick")
STUDIES = str(config.get("studies", "")).split(",") if config.get("studies") else [
    stem for stem in project.studies() if SCALE in project.scales(stem)
]
WORK = config.get("work", f"build/snakemake/{SCALE}")
RESULTS = config.get("results", f"{WORK}/results")
GPU = config.get("gpu", "")
if config.get("machine"):  # whose records count: not those of the machine that plans
    os.environ[records.MACHINE] = config["machine"]
if GPU:  # what precision "auto" means: not what is fast on the machine that plans
    os.environ[records.PRECISION] = "bf16" if find_gpu(GPU).bf16_is_fast else "fp32"
MEMSTUDY = f"{shlex.quote(sys.executable)} -m memstudy.cli"


wildcard_constraints:
    stem="|".join(STUDIES),
    round="[0-9]+",
    run_id="[0-9a-f]{16}",


def planned(stem, round):
    """What the plan of that round asked for: by run id, what its job needs. Not made yet, it is made first."""
    return json.loads((Path(checkpoints.plan.get(stem=stem, round=round).output[0]) / "needs.json").read_text())


def records_before(wildcards):
    return [f"{RESULTS}/{wildcards.stem}/{run}.json" for n in range(int(wildcards.round)) for run in planned(wildcards.stem, n)]


def records_of(stem):
    """The records of all rounds, up to the first that lacks nothing."""
    found, n = [], 0
    while more := planned(stem, n):
        found += [f"{RESULTS}/{stem}/{run}.json" for run in more]
        n += 1
    return found


def results_of(wildcards, input):
    """Where the job finds the records that it gets, which may be copies of those in a store."""
    return Path(input[0]).parents[1] if input else RESULTS


def plan_of(wildcards):
    """Of the first round that asked for the run."""
    rounds = itertools.count()
    return f"{WORK}/plans/{wildcards.stem}/{next(n for n in rounds if wildcards.run_id in planned(wildcards.stem, n))}"


def need(name, default=0):
    def of(wildcards, attempt):
        asked = planned(wildcards.stem, plan_of(wildcards).rpartition("/")[2])[wildcards.run_id]
        return asked.get(name, default) * (1 if name == "gpu" else attempt)

    return of


def every_record(wildcards):
    return [record for stem in STUDIES for record in records_of(stem)]


localrules:
    report,
    records,


rule report:
    input:
        every_record,
    output:
        f"{WORK}/report.pdf",
    params:
        results=results_of,
    shell:
        f"{MEMSTUDY} report {' '.join(STUDIES)} --scale {SCALE} --results {{params.results}} --no-run && cp build/report.pdf {{output}}"


rule records:  # all but notebooks and PDF
    input:
        every_record,


checkpoint plan:
    input:
        records_before,
    output:
        directory(f"{WORK}/plans/{{stem}}/{{round}}"),
    params:
        results=results_of,
    resources:
        mem_mb=4000,
    shell:
        f"{MEMSTUDY} plan {{wildcards.stem}} {{output}} --scale {SCALE} --results {{params.results}}" + f" --gpu {GPU}" * bool(GPU)


rule run:
    input:
        plan=plan_of,
    output:
        f"{RESULTS}/{{stem}}/{{run_id}}.json",
    resources:
        mem_mb=need("mem_mb"),
        gpu=need("gpu"),
        gpu_mem_mb=need("gpu_mem_mb"),
        runtime=need("runtime", 240),  # minutes; the default where no time is predicted
    retries: 2
    shell:
        f"{MEMSTUDY} run {{input.plan}}/{{wildcards.run_id}}.json --results $(dirname {{output}})"
