"""Run by test_many_devices.py in processes of their own: what a process sees of devices is decided once.

    on_many_devices.py FOLDER MESHES             several meshes of the devices of one process
    on_many_devices.py FOLDER MESHES PORT INDEX  the same on the devices of two processes

FOLDER has the checkpoint ``base`` and the text ``text.txt``; each mesh writes a folder of its own there.
"""

import json
import sys
from pathlib import Path

import jax

from jsparse.models.sharding import MeshConfig
from jsparse.train import FinetuneConfig, finetune


def main(folder: str, meshes: str, port: str | None = None, index: str | None = None) -> None:
    if port is not None and index is not None:
        jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
    for name, settings in json.loads(meshes).items():
        mesh = MeshConfig(**settings.pop("mesh", {}))
        config = FinetuneConfig(
            model=Path(folder, "base"),
            data=[Path(folder, settings.pop("data", "text.txt"))],
            output=Path(folder, name),
            context=64,
            lora_rank=2,
            steps=2,
            batch_size=8,
            learning_rate=1e-3,
            warmup_steps=0,
            mesh=mesh,
            **settings,
        )
        finetune(config)  # with all that it says on the way
    print("done on", jax.device_count(), "devices of", jax.process_count(), "processes")


if __name__ == "__main__":
    main(*sys.argv[1:])
