#!/bin/sh
# Predict lit-gpt's and torchtune's rows with their code of the time, which is fetched to build/of_their_time.
#   sh benchmarks/prediction/of_their_time.sh
# Three minutes. PYTHON is the Python that has memstudy: .venv/bin/python by default.
set -e
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
into=build/of_their_time
mkdir -p $into

fetch() { # a repository, a commit
    at=$into/$(basename "$1")
    test -d "$at" || git clone --quiet "https://github.com/$1" "$at"
    git -C "$at" checkout --quiet "$2"
}

fetch Lightning-AI/litgpt 0cc02afa
fetch pytorch/torchtune 0914d5cfb
# What they import and memstudy does not; nothing goes into memstudy's own environment.
test -d $into/packages || $python -m pip install --quiet --no-deps --target $into/packages \
    lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 \
    torchao==0.1 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 sentencepiece==0.2.1 'setuptools<81'
export PYTHONPATH="$PWD:$PWD/$into/litgpt:$PWD/$into/torchtune:$PWD/$into/packages"
for table in lit-gpt torchtune; do
    $python benchmarks/prediction modern --rows "$table: "
done
