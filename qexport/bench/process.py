"""The process of one contender: loads it, then plays a batch whenever it is told to.

A process of its own for each, so that its memory is its own and no runtime's threads get in another's way. What it
holds is counted above what it held when ONNX Runtime (or torch) was imported and nothing was loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from qexport.bench.contender import Contender, Settings
from qexport.bench.memory import peak_bytes, resident_bytes

LONGEST_TEXT = 300
"""Characters of an error that go into the report."""


@dataclass(frozen=True)
class Held:
    """Memory above the empty process, in bytes: `session` after the last batch, `peak` ever, `device` on a GPU."""

    session: int | None
    peak: int | None
    device: int | None


class Racer:
    """A contender in its process. `failed` says why it is out, where it is."""

    def __init__(self, contender: Contender, settings: Settings) -> None:
        self.contender = contender
        self.failed: str | None = None
        self.load_s: float | None = None
        self.held = Held(None, None, None)
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_child, args=(end, contender, settings), daemon=True)
        self._process.start()
        end.close()
        answer = self._answer()
        if answer is not None:
            self.load_s = answer["load_s"]

    def play(self, batch: int) -> dict[str, float] | None:
        """Seconds of each graph and of the whole batch; None if it fails."""
        try:
            self._pipe.send(batch)
        except OSError:
            self.failed = self.failed or "its process has ended"
            return None
        answer = self._answer()
        if answer is None:
            return None
        self.held = Held(**answer["held"])
        return answer["seconds"]

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            try:
                self._pipe.send(None)
            except OSError:
                self._process.terminate()
            self._process.join(timeout=10)
            if self._process.is_alive():
                self._process.terminate()
        self._pipe.close()

    def _answer(self) -> dict[str, Any] | None:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=1)
            self.failed = f"its process ended without an answer (exit code {self._process.exitcode})"
            return None
        if "failed" in answer:
            self.failed = answer["failed"]
            return None
        return answer


def stop_all(racers: Iterable[Racer]) -> None:
    """End all processes."""
    for racer in racers:
        racer.stop()


def _child(pipe: Connection, contender: Contender, settings: Settings) -> None:
    os.dup2(2, 1)  # stdout may be the JSON of the command
    try:
        start, before, device_before = _empty(contender, settings)
        player, classes = _load(contender, settings)
        pipe.send({"load_s": time.perf_counter() - start})
        from qexport.runtime.clock import play_once, some_labels

        while (batch := pipe.recv()) is not None:
            seconds = play_once(player, some_labels(player, batch, classes), batch, settings.calls)
            held = _above(before, device_before, settings)
            pipe.send({"seconds": seconds, "held": held})
    except (EOFError, KeyboardInterrupt):
        return  # the run was given up
    except Exception as error:  # the table says so and goes on
        text = (str(error).strip() or "no words").splitlines()[0]
        pipe.send({"failed": f"{type(error).__name__}: {text[:LONGEST_TEXT]}"})


def _empty(contender: Contender, settings: Settings) -> tuple[float, int | None, int | None]:
    """The clock and the memory before anything is loaded."""
    if contender.torch:
        import torch

        from qexport.bench import torch_player  # noqa: F401

        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
    else:
        import onnxruntime  # noqa: F401

        from qexport.runtime import runtime  # noqa: F401
    return time.perf_counter(), resident_bytes(), _device_used(settings)


def _load(contender: Contender, settings: Settings) -> tuple[Any, int]:
    """A player, and the number of classes."""
    from qexport.bundle import Bundle

    bundle = Bundle.open(contender.bundle, "size")
    model = bundle.manifest.model
    if contender.torch:
        from qexport.bench.torch_player import make_torch_player

        device = "cuda" if settings.provider == "cuda" else "cpu"
        player: Any = make_torch_player(
            model, device, contender.compiled, contender.checkpoint, contender.vae_checkpoint
        )
    else:
        from qexport.runtime import Player
        from qexport.runtime.ort_backend import OrtBackend
        from qexport.runtime.session import make_session

        configs = contender.configs
        sessions = {
            name: make_session(file, contender.root, configs[name], settings.threads)
            for name, file in contender.files.items()
        }
        device = next(iter(configs.values())).device
        if contender.captured:
            from qexport.runtime.static_backend import StaticBackend, check_plan

            check_plan(bundle.plan)
            backend = StaticBackend(sessions, device, captured=device == "cuda")
        else:
            backend = OrtBackend(sessions, device)
        player = Player(bundle.plan, backend, bundle.tables())
    return player if settings.schedule is None else player.with_schedule(settings.schedule), model.num_classes


def _above(before: int | None, device_before: int | None, settings: Settings) -> dict[str, int | None]:
    now, peak, device = resident_bytes(), peak_bytes(), _device_used(settings)
    return {
        "session": None if now is None or before is None else now - before,
        "peak": None if peak is None or before is None else peak - before,
        "device": None if device is None or device_before is None else device - device_before,
    }


def _device_used(settings: Settings) -> int | None:
    if settings.provider == "cpu":
        return None
    from qexport.targets.ort_cuda import used_bytes

    return used_bytes()
