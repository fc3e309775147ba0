# Sourced in the repository's root of the machine that has only torch, once per piece that arrived:
#   . benchmarks/gpu/install.sh FOLDER
# FOLDER outlives the pieces. It gets the packages, the data and, once both halves are there, SmolLM2.
gpu=${1:?usage: . install.sh FOLDER}
mkdir -p "$gpu"
if [ -d .gpu/1 ] && [ ! -f "$gpu/installed" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade \
        --target "$gpu/site" .gpu/1/wheels/*.whl && touch "$gpu/installed"
    cp -r .gpu/1/data .gpu/1/tokenizer "$gpu/"
fi
cp .gpu/?/smollm2.gguf.?.gz "$gpu/" 2> /dev/null
export PYTHONPATH=$gpu/site:$PWD/src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
[ -f "$gpu/smollm2/config.json" ] || python3 benchmarks/gpu/smollm2.py "$gpu" "$gpu/tokenizer" "$gpu/smollm2"
