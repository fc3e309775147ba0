"""SmolLM2 as a Transformers folder, from the halves of its GGUF file.

    python benchmarks/gpu/smollm2.py PIECES TOKENIZER FOLDER

Until both halves are in PIECES, FOLDER gets the tokenizer alone, which is enough for all parts of
the check but the last.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file

OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
INSIDE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def main(pieces: Path, tokenizer: Path, folder: Path) -> None:
    """Joins, converts and writes."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = [pieces / f"smollm2.gguf.{number}.gz" for number in (0, 1)]
    whole = all(half.is_file() for half in halves)
    if whole:
        save_file(weights(halves, tokenizer), folder / "model.safetensors", {"format": "pt"})
    for file in tokenizer.iterdir():
        # A folder with a configuration is a model.
        if whole or file.name != "config.json":
            shutil.copy(file, folder)


def weights(halves: list[Path], tokenizer: Path) -> dict[str, torch.Tensor]:
    """All tensors in float32, under Transformers' names."""
    config = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found: dict[str, torch.Tensor] = {}
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        for half in halves:
            file.write(gzip.decompress(half.read_bytes()))
        file.flush()
        for tensor in GGUFReader(file.name).tensors:
            *layer, kind = tensor.name.removesuffix(".weight").split(".")
            name = f"model.layers.{layer[1]}.{INSIDE[kind]}" if layer else OUTSIDE[kind]
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            weight = torch.from_numpy(values)
            if kind in heads:  # GGUF has the rotary halves of every head interleaved
                rows, columns = weight.shape
                apart = weight.view(heads[kind], -1, 2, columns)
                weight = apart.transpose(1, 2).reshape(rows, columns)
            found[f"{name}.weight"] = weight.contiguous()
    if config.get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
