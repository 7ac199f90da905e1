"""The measured speeds as one picture: hf_moe beside Transformers on the same card, in the same run.

    python benchmarks/speed_picture.py

Reads moe_layer_h200.json, whole_model.json and, where that is of the same card, mla_decode_gpu.json in
benchmarks/results/ and writes speed.png there. Where
Transformers has an option that was measured too (SonicMoE, a compiled step), a thin bar shows it.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
WORKS = ["training", "prefill", "decoding, batch 1", "decoding, batch 16"]


def rows() -> list[tuple[str, float, float, str, str, float | None]]:
    """Label, Transformers' number, ours, unit, and the name and number of Transformers' option, if measured."""
    reports = [
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("moe_layer_h200", "whole_model", "mla_decode_gpu")
    ]
    layers, whole, latent = (report["results"] for report in reports)
    speed = "forward_backward_tflops"
    found = [
        (
            f"{name} layer, forward and backward",
            row["grouped_mm"][speed],
            row["hf_moe"][speed],
            "TFLOP/s",
            "SonicMoE",
            row.get("sonicmoe", {}).get(speed),
        )
        for name, row in layers.items()
    ]
    for work in WORKS:
        theirs, ours = (whole[peer][work]["tokens_per_second"] for peer in ("transformers", "hf_moe"))
        compiled = whole.get("transformers, compiled", {}).get(work, {}).get("tokens_per_second")
        found.append((f"OLMoE-1B-7B, {work}", theirs, ours, "tok/s", "compiled", compiled))
    cases = ("batch 1, context 32768", "batch 16, context 4096")
    for case in cases if reports[2]["device"] == reports[1]["device"] else ():
        theirs, ours = (latent[f"{peer}, {case}"]["tokens_per_second"] for peer in ("transformers", "hf_moe"))
        found.append((f"DeepSeek-V2-Lite, decoding,\n{case}", theirs, ours, "tok/s", "", None))
    return found


def main():
    found = rows()
    figure, axes = plt.subplots(figsize=(11, 5))
    ratios = [ours / theirs for _, theirs, ours, *_ in found]
    places = range(len(found))
    axes.barh(places, ratios, color="#0072B2", label="hf_moe")
    for place, ratio, (_, theirs, ours, unit, name, other) in zip(places, ratios, found, strict=True):
        text = f"{ratio:.1f}x   {theirs:,.0f} to {ours:,.0f} {unit}"
        if other is not None:
            axes.barh(place, other / theirs, height=0.2, color="#E69F00")
            text += f" ({name}: {other:,.0f})"
        axes.text(max(ratio, (other or 0) / theirs) + 0.1, place, text, va="center", fontsize=9)
    axes.barh(0, 0, color="#E69F00", label="Transformers with an option")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.axvline(1, color="#555555", linewidth=1)
    axes.set_yticks(places, [label for label, *_ in found])
    axes.invert_yaxis()
    axes.set_xlim(0, max(ratios) * 1.75)
    axes.set_xlabel("times Transformers' speed")
    axes.set_title(json.loads((RESULTS / "whole_model.json").read_text())["device"] + ", bfloat16", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "speed.png", dpi=130)


if __name__ == "__main__":
    main()
