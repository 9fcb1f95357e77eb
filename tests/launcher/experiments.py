"""A small experiment, for tests to change."""

from pathlib import Path
from typing import Any

import yaml

CONTENT: dict[str, Any] = {
    "name": "small",
    "model": {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_experts": 8,
        "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "vocab_size": 256,
        "megatron": {"position-embedding-type": "rope"},
    },
    "data": {"mock": True, "seq_length": 128, "tokenizer": "NullTokenizer"},
    "cluster": {"processes_per_node": 2, "slurm": {"account": "llm", "minutes": 60}},
    "defaults": {"nodes": 1, "global_batch_size": 16, "save_interval": 5,
                 "megatron": {"bf16": True}},
    "stages": [
        {"name": "base", "learning_rate": {"peak": 1.0e-3}, "budget": {"iterations": 10}},
        {"name": "deep", "growth": {"depth": {"factor": 2}}, "nodes": 2,
         "layout": {"pipeline": 2, "expert": 2}, "budget": {"tokens": 20480}},
        {"name": "wide", "growth": {"width": {"factor": 2}}, "budget": {"iterations": 5}},
    ],
}  # fmt: skip


def write(directory: Path, content: Any = CONTENT, name: str = "experiment.yaml") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
