"""Which GPU a process takes, over what it speaks, and what is refused: with stand-ins for CUDA and NCCL.

The real thing is `tests/gpu/test_several_gpus.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qexport.distill import processes
from qexport.distill.run import require_device
from qexport.errors import InputError
from qexport.reference.device import placed


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch):
    """Set what ``torchrun`` would for a process, on a machine with some GPUs."""

    def as_if(rank: int, world: int, *, local: int | None = None, on_host: int | None = None, gpus: int = 2) -> None:
        told = {"RANK": rank, "WORLD_SIZE": world}
        told |= {} if local is None else {"LOCAL_RANK": local}
        told |= {} if on_host is None else {"LOCAL_WORLD_SIZE": on_host}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: True)

    return as_if


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of CUDA and of `torch.distributed`, in order."""
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(("set_device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **named: made.append((*given, named)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append("parted"))
    return made


def test_alone_it_is_the_device_that_was_named(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes.own_device("cpu") == torch.device("cpu")
    assert processes.own_device("cuda") == torch.device("cuda")
    with processes.process_group("cuda"):
        pass
    assert calls == []


@pytest.mark.parametrize(("rank", "local"), [(0, 0), (1, 1), (4, 0), (5, 1)])
def test_of_two_hosts_with_two_gpus_each_process_takes_its_own(launch, calls, rank: int, local: int) -> None:
    launch(rank, 6, local=local, on_host=2)
    mine = torch.device("cuda", local)
    assert processes.own_device("cuda") == mine
    with processes.process_group("cuda"):
        assert calls == [("set_device", mine), ("nccl", {"timeout": processes.PATIENCE, "device_id": mine})]
    assert calls[2:] == ["parted"]
    assert processes.sharing("cuda") == 1
    assert processes.sharing("cpu") == 2


def test_on_the_cpu_nobody_touches_a_gpu(launch, calls) -> None:
    launch(1, 2, local=1, on_host=2)
    assert processes.own_device("cpu") == torch.device("cpu")
    with processes.process_group():
        assert calls == [("gloo", {"timeout": processes.PATIENCE})]
    assert calls[1:] == ["parted"]


@pytest.mark.parametrize(("device", "parted"), [("cpu", True), ("cuda", False)])
def test_one_that_fails_on_cuda_does_not_wait_for_the_others(launch, calls, device: str, parted: bool) -> None:
    launch(0, 2, local=0, on_host=2)
    with pytest.raises(InputError), processes.process_group(device):
        raise InputError("diverged")
    assert ("parted" in calls) == parted


def test_fewer_gpus_than_processes_are_refused_in_one_line(launch) -> None:
    launch(1, 2, local=1, on_host=2, gpus=1)
    with pytest.raises(InputError) as refused:
        require_device("cuda", "--device")
    assert str(refused.value) == (
        "--device cuda: 2 processes on this host, 1 GPU; each takes one of its own: start 1 (torchrun "
        "--nproc-per-node 1)"
    )
    require_device("cpu", "--device")
    launch(1, 2, local=1, on_host=2, gpus=2)
    require_device("cuda", "--device")
    launch(7, 8, local=1, on_host=2, gpus=2)  # four hosts
    require_device("cuda", "--device")
    launch(1, 2, gpus=1)  # another launcher, that does not say who is on this host
    with pytest.raises(InputError, match="2 processes on this host, 1 GPU;"):
        require_device("cuda", "--device")


def test_a_build_without_nccl_is_said(launch, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(0, 2, local=0, on_host=2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: this PyTorch has no NCCL"):
        require_device("cuda", "--device")
    launch(0, 1, local=0, on_host=1, gpus=1)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    require_device("cuda", "--device")  # alone it needs none


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_parts_are_made_on_a_mesh_of_their_own_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    made: list[Any] = []
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda kind, shape: (kind, shape))
    monkeypatch.setattr(
        "torch.distributed.fsdp.fully_shard", lambda module, mesh, **named: made.append((module, mesh, named))
    )
    monkeypatch.setattr(processes, "world", lambda: 4)
    modules = [nn.Linear(2, 2), nn.Linear(2, 2)]
    monkeypatch.setattr(nn.Parameter, "device", torch.device(device), raising=False)
    processes.divide(iter(modules))
    assert [entry[0] for entry in made] == modules
    assert [entry[1] for entry in made] == [(device, (4,))] * 2


def test_a_model_on_another_gpu_is_not_taken_for_ones_own(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexport.reference.device.device_of", lambda generator: torch.device("cuda", 0))
    monkeypatch.setattr("qexport.reference.device.to_device", lambda generator, device: ("moved", str(device)))
    assert placed(tiny, "cuda") is tiny
    assert placed(tiny, "cuda:0") is tiny
    assert placed(tiny, torch.device("cuda", 1)) == ("moved", "cuda:1")
    assert placed(tiny, "cpu") == ("moved", "cpu")


def test_norms_are_made_where_the_gradients_lie() -> None:
    """On the device without numbers: what is made on the CPU, or read back, raises."""
    found = processes._square([torch.ones(3, device="meta")], torch.device("meta"))
    assert found.device.type == "meta"
    assert found.dtype == torch.float64
