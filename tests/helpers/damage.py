"""Checkpoints made bad."""

import json
from pathlib import Path

import tiny
from safetensors.torch import load_file, save_file

UP = "model.layers.2.mlp.up_proj.weight"


def change_config(path: Path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def change_tensor(path: Path, name: str, change):
    tensors = load_file(path / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, path / "model.safetensors", metadata={"format": "pt"}
    )


def poison(value):
    def change(tensor):
        tensor.view(-1)[3] = value
        return tensor

    return change


def remake(path: Path, kind="llama", **changes):
    tiny.save(tiny.build(tiny.config(kind, **changes), 3), path)
