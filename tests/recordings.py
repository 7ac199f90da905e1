"""Recorded decoding on a CPU: its loops, with steps that run where a GPU would replay them."""

from contextlib import nullcontext

import torch

from hf_moe.model import decoding, recorded_drafts


class Unrecorded:
    """`Recording` on a CPU: the function itself, with caches as a recording sees them."""

    def __init__(self, run, model, tokens):
        self.run, self.step, self.tokens = run, run.__self__, tokens

    def __call__(self):
        for layer in self.step.layers:
            layer.recorded = True
        try:
            with decoding.sped_up(self.step.model, self.tokens):
                return self.run()
        finally:
            for layer in self.step.layers:
                layer.recorded = False


class LateOnCpu:
    """`Late` without a device to wait for."""

    def __init__(self):
        self.last = None

    def put(self, x: torch.Tensor) -> torch.Tensor | None:
        self.last, late = x.clone(), self.last
        return late


def decode_on_cpu(monkeypatch) -> None:
    """Texts go through the loops of recorded ones, each step as it is in place of a recording."""
    monkeypatch.setattr(decoding, "recordable", lambda model: True)
    monkeypatch.setattr(decoding, "WORTH_RECORDING", 1000)
    monkeypatch.setattr(decoding, "SPEEDUPS", [])
    for module in (decoding, recorded_drafts):
        monkeypatch.setattr(module, "Late", LateOnCpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def record_on_cpu(monkeypatch) -> None:
    """As decode_on_cpu, with steps that are as recorded ones in all but the graph."""
    decode_on_cpu(monkeypatch)
    monkeypatch.setattr(decoding, "WORTH_RECORDING", 1)
    monkeypatch.setattr(decoding, "Recording", Unrecorded)
