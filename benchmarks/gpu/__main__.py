"""Checks correctness and speed on a machine with one GPU, and prints one JSON line per result.

    python benchmarks/gpu --model SMOLLM2 --data HH [--out OUT] [--parts exact,flex] [--until 600]
    python benchmarks/gpu --tiny

SMOLLM2 is a Transformers folder, and HH is the folder of the HH files. Results are printed and
added to OUT/results.jsonl. An error is printed as a line, and the check continues. A part is
stopped at its time limit. `--tiny` is a dry run on the CPU. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "src")]


def main() -> int:
    """Returns the exit status: 0 if every part ran to its end."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also stops the current part
    from running import PARTS, TINY_WORLD, run

    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = HERE.parents[1]
    parser.add_argument(
        "--model",
        type=Path,
        default=root / "outputs/real/smollm2",
        help="a folder with SmolLM2 (make real)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=root.parent / "shared/data/hh-rlhf",
        help="a folder with the HH files",
    )
    parser.add_argument(
        "--out", type=Path, default=root / "outputs/gpu", help="a folder for the results"
    )
    parser.add_argument(
        "--parts", default=",".join(names), help="names of parts, in the order to run"
    )
    parser.add_argument(
        "--shapes", default="1b,7b,smollm2", help="model shapes for the speed parts"
    )
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds for all parts")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    given = parser.parse_args()
    asked = given.parts.split(",")
    if unknown := [name for name in asked if name not in names]:
        parser.error(f"no part is called {', '.join(unknown)}: there are {', '.join(names)}")

    # Asked of the driver: nothing that is forked later may have started CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if given.tiny:
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads cost more than they give
    import torch

    if not given.tiny and not torch.cuda.is_available():
        print("no CUDA device: torch sees none (a dry run on the CPU: --tiny)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="self-judge-gpu-") as folder:
        if given.tiny:
            given.model, given.data = Path(folder, "model"), Path(folder, "data")
            given.shapes = "smollm2"
        for path, file, what in (
            (given.model, "tokenizer.json", "SmolLM2: --model"),
            (given.data, "base_test_1000.jsonl*", "the HH files: --data"),
        ):
            if not given.tiny and not any(path.glob(file)):
                print(f"{path} has no {file}: give the folder of {what}", file=sys.stderr)
                return 2
        from measuring import Check

        given.out.mkdir(parents=True, exist_ok=True)
        check = Check(
            part="",
            out=given.out.resolve(),
            data=given.data.resolve(),
            model=given.model.resolve(),
            aside=Path(folder),
            shapes=tuple(given.shapes.split(",")),
            tiny=given.tiny,
            started=started,
        )
        parts = {part.name: part for part in PARTS}
        chosen = [parts[name] for name in asked]
        if given.tiny:
            chosen.insert(0, TINY_WORLD)
        return 0 if run(chosen, check, started + given.until) else 1


if __name__ == "__main__":
    sys.exit(main())
