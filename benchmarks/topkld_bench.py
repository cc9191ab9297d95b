"""One model as topkld_quality.py measures it: its judge, its samples, and where training starts, each made once.

What is made is kept in a folder that many processes share: `MODEL-SOURCE-COUNT-SEED.pt` the samples of a seed,
`starts/MODEL-RECIPE-DIGEST.pickle` what post-training quantisation found and its seconds, by the digest of the recipe.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from topkld_jobs import HEAD, Sweep
from torch import Tensor

from qexport.compare import Judge, make_judge
from qexport.distill import Samples, drawn_latents, drawn_tokens
from qexport.distill import image_tokens as tokens_of_images
from qexport.family import Generator, LogitModel, find_model
from qexport.methods import parse_method
from qexport.recipe import Recipe, recipe_for
from qexport.recipe_toml import recipe_text
from qexport.reference import Interception, apply_folds, torch_player
from qexport.reference.device import placed, to_device
from qexport.reference.fake_quant import fake_quantise
from qexport.reference.interception import Window, layer_weights
from qexport.reference.twin import quantised_twin
from qexport.scheme import PerStep, Scheme
from qexport.solution import Activation, Solution
from qexport.solve import solve
from qexport.totals import layer_row, totals
from qexport.verify.fd import measure_fd
from qexport.verify.images import open_images
from qexport.verify.quality import tokens_of, torch_logits
from qexport.verify.trajectory import label_inputs, labels_for

EVERY = {"var": 20, "dit": 40}
BATCH = 25
FD_BATCH = {"var": 100, "dit": 500}
"""Images sampled at once on a GPU: the logits of 100 at VAR's last scale take 210 MB, several times over."""


def recipe_of(plain: Generator, scheme: Scheme, method: str) -> Recipe:
    parsed = parse_method(method)
    return recipe_for(scheme, plain.default_layers, f"{scheme.name}-{method}", parsed.algorithm, parsed.smooth)


class Bench:
    """One model, on the CPU and where it computes: its judge, its test tokens, and the samples of each seed."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        family, entry = find_model(name)
        self.plain: Generator = family.load(entry, None, None)
        self.full = placed(self.plain, options.device)
        self.name, self.device, self.images = name, options.device, options.images
        self.work = options.work

    @cached_property
    def judge(self) -> Judge:
        """On the test images."""
        return make_judge(self.full, images=self.images, every=EVERY[self.plain.entry.family])

    @cached_property
    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Labels and tokens of the test images; none where the model has no tokens."""
        entry = self.plain.entry
        if self.plain.quality is None:
            return []
        every = EVERY[entry.family]
        given = open_images(self.images, size=entry.image_size, num_classes=entry.num_classes, every=every)
        return list(tokens_of(self.full, given, BATCH))

    def samples(self, sweep: Sweep, seed: int) -> Samples:
        """What the teacher draws with that seed, or the tokens of the training images."""
        source = "drawn" if sweep.train is None else sweep.train.stem
        path = self.work / f"{self.name}-{source}-{sweep.samples}-{seed}.pt"
        if not path.exists():
            found = self._make(sweep, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save({"tensors": list(found.tensors), "source": found.source}, partial)
            partial.replace(path)
        state = torch.load(path, weights_only=True)
        return Samples(tuple(state["tensors"]), state["source"])

    def _make(self, sweep: Sweep, seed: int) -> Samples:
        if self.plain.denoise is not None:
            return drawn_latents(self.full, sweep.samples, seed, 10)
        if sweep.train is None:
            return drawn_tokens(self.full, sweep.samples, seed)
        entry = self.plain.entry
        images = open_images(sweep.train, size=entry.image_size, num_classes=entry.num_classes)
        order = np.random.default_rng(seed).permutation(len(images))[: sweep.samples]
        chosen = replace(images, load=lambda i: images.load(int(order[i])), labels=images.labels[order])
        return tokens_of_images(self.plain, chosen.batches(BATCH), f"{len(order)} images of {sweep.train.name}")

    def start(self, recipe: Recipe) -> tuple[Generator, Solution, float]:
        """The folded model and the solution of post-training quantisation, and the seconds of whoever found it."""
        folded = copy.deepcopy(self.plain)
        text = recipe_text(recipe)  # schemes may share a name: W2 and ternary do
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = self.work / "starts" / f"{self.name}-{recipe.name}-{digest}.pickle"
        if not path.exists():
            begin = time.perf_counter()
            found = solve(copy.deepcopy(self.plain), recipe), time.perf_counter() - begin
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(pickle.dumps(found))
            partial.replace(path)
        found, seconds = pickle.loads(path.read_bytes())
        solution = Solution(**vars(found))  # with what solutions of before did not have
        apply_folds(folded, solution.smooth)
        return folded, solution, seconds

    def figures(self, recipe: Recipe, solution: Solution, fd: int) -> dict[str, Any]:
        """Quality and size of a solution."""
        rows: list[dict[str, Any]] = []
        twin = quantised_twin(self.plain, recipe, solution, lambda weight: rows.append(layer_row(weight))).quantised
        to_device(twin, self.device)
        judged, by_plan = twin, bool(solution.activations)
        if by_plan and twin.quality is not None:
            judged, by_plan = replace(twin, quality=RoundedLogits(twin, solution.activations)), False
        found = dict(self.judge(judged, by_plan))
        found.pop("seed", None)  # the judge's; a row has that of training
        if "loss" in found:  # a row's is what was minimised
            found["ddpm_loss"] = found.pop("loss")
        if self.batches:
            found |= self._heads(judged)
        if fd:
            found["fd"] = self._frechet(twin, fd)
        summed = totals(rows)
        found["bits_per_weight"] = summed["bits_per_weight_quantized"]
        found["information_bits_per_weight"] = summed["information_bits_per_weight_quantized"]
        return found

    def _heads(self, twin: Generator) -> dict[str, float]:
        """Agreement of the 900 most likely tokens, and KL renormalised on the teacher's."""
        shared = kl = positions = 0.0
        teacher, student = torch_logits(self.full), torch_logits(twin)
        for labels, tokens in self.batches:
            p, q = (model(labels, tokens) for model in (teacher, student))
            head = p.topk(HEAD, sorted=False)
            mask = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, head.indices, True)
            shared += float(mask.gather(-1, q.topk(HEAD, sorted=False).indices).sum()) / HEAD
            log_p, log_q = head.values.log_softmax(-1), q.gather(-1, head.indices).log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).double().sum())
            positions += tokens.size
        return {"top900_agreement": shared / positions, "kl_top900": kl / positions}

    def _frechet(self, twin: Generator, count: int) -> dict[str, Any]:
        assert twin.features is not None
        player, labels = torch_player(twin), labels_for(count, twin.entry.num_classes)
        size = 50 if self.device == "cpu" else FD_BATCH[twin.entry.family]
        batches = (
            player.play(label_inputs(twin.plan, labels[i : i + size]), seed=0, first_index=i)
            for i in range(0, count, size)
        )
        return measure_fd(batches, twin.features, 0, self.device).to_json()


class RoundedLogits:
    """Teacher forcing of a model whose layers see rounded inputs; a `qexport.family.LogitModel`.

    All positions in one pass, where `qexport.reference.forced` takes a plan step by step: the scales of activations
    must not change between steps.

    Raises:
        AssertionError: they do.
    """

    def __init__(self, twin: Generator, activations: Mapping[str, Activation]) -> None:
        """Take the quantised model, where it lies, and how inputs of its layers are rounded."""
        assert twin.quality is not None
        assert not any(isinstance(found.spec.scales, PerStep) for found in activations.values())
        self._inner: LogitModel = twin.quality
        weights = layer_weights(twin)
        self._weights = {layer: weights[layer] for layer in activations}
        self._activations = activations

    @property
    def scale_lengths(self) -> Sequence[int]:
        """See `LogitModel`."""
        return self._inner.scale_lengths

    def tokenize(self, images: Tensor) -> Tensor:
        """See `LogitModel`."""
        return self._inner.tokenize(images)

    def teacher_forced_logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """See `LogitModel`."""

        def visit(layer: str, x: Tensor, window: Window | None) -> Tensor:
            return fake_quantise(x, self._activations[layer])

        with Interception(self._weights, visit) as mode:
            logits = self._inner.teacher_forced_logits(labels, tokens)
        mode.require_seen(self._weights)
        return logits
