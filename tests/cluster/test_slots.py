"""A slot is a safetensors file: other programs read it, and torch's distributed checkpoint loads a folder of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from snapshotd import _native
from tests.cluster.harness import Stage, stage


def write_newest_slots(scene: Stage, folder: Path) -> list[Path]:
    """Each rank's newest committed slot as a file of exactly its length."""
    files = []
    for path in scene.daemon.arenas():
        fd = os.open(path, os.O_RDONLY)
        arena = _native.Arena(fd, writable=False)
        os.close(fd)
        slots = [arena.slot(index) for index in range(arena.slots)]
        newest = max((one for one in slots if one.state == _native.COMMITTED), key=lambda one: one.step)
        view = arena.slot_view(newest.index)
        assert not any(view[newest.file_bytes :]), "bytes between the file's end and the slot's end are zero"
        files.append(folder / f"rank{newest.rank}.safetensors")
        files[-1].write_bytes(view[: newest.file_bytes])
        view.release()
        arena.close()
    return files


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's row-major bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_a_slot_opens_as_safetensors_with_every_dtype_and_shape(shm_dir: Path, tmp_path: Path) -> None:
    with stage(shm_dir, tmp_path) as scene:
        dead = scene.run("many_dtypes", steps=8, die="after_commit", die_step=5, dump=str(tmp_path / "state"))
        assert dead.process.exitcode == -9, dead.events("error")
        (file,) = write_newest_slots(scene, tmp_path)
    expected = torch.load(tmp_path / "state.0", weights_only=True)
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        assert {"embed.weight", "scale", "empty", "crossed", "conv.weight", "narrow", "frozen", "rank0/host"} <= names
        assert "out.weight" not in names, "tied tensors are stored once"
        for name in names & set(expected):
            found = opened.get_tensor(name)
            assert found.dtype == expected[name].dtype
            assert found.shape == expected[name].shape, name
            assert torch.equal(raw(found), raw(expected[name])), name
        spin = opened.get_tensor("rank0/buffers/spin")
        assert spin.dtype == torch.uint8 and spin.shape == (3 * 16,), "readers lack complex128: it is stored as bytes"


@pytest.mark.parametrize("recipe", ["fsdp", "ddp"])
def test_torch_distributed_checkpoint_loads_a_folder_of_slots(recipe: str, shm_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slots"
    folder.mkdir()
    with stage(shm_dir, tmp_path) as scene:
        group = scene.start_group(recipe, 2, steps=8, die="after_commit", die_step=5, dump=str(tmp_path / "state"))
        assert [one.join() for one in group] == [-9, -9], [one.events("error") for one in group]
        assert len(write_newest_slots(scene, folder)) == 2
    expected: dict[str, Any] = torch.load(tmp_path / "state.0", weights_only=True)
    loaded = {name: torch.full_like(value, float("nan")) for name, value in expected.items()}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(folder)))
    assert len(loaded) >= 12
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name
