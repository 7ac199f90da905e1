"""The memory that conversions take as the commands are given, their check included.

    python benchmarks/conversion_memory.py SMOLLM2 --work DIR --out benchmarks/results/conversion_memory.md

SMOLLM2: a folder of SmolLM2-135M. Memory is the largest sum of RssAnon over the process and its children, as in
`conversion.py`, of which importing torch and Transformers takes the first line's share.
"""

import argparse
import shutil
from importlib.metadata import version
from pathlib import Path

from conversion import EXPERTS, TOP_K, measured

CONVERT = f"hf-moe upcycle {{dense}} {{moe}} --experts {EXPERTS} --top-k {TOP_K}"
COMMANDS = {
    "hf-moe upcycle ... --dry-run": f"{CONVERT} --dry-run",
    "hf-moe upcycle ... --no-verify": f"{CONVERT} --no-verify",
    "hf-moe upcycle": CONVERT,
    "hf-moe export --to mixtral": "hf-moe export {moe} {mixtral} --to mixtral",
    "hf-moe import": "hf-moe import {mixtral} {imported}",
    "hf-moe verify": "hf-moe verify {dense} {imported} --tolerance 1e-3",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folders = {name: args.work / name for name in ("moe", "mixtral", "imported")}
    lines = ["| command | GB of memory |", "|---|---:|"]
    for name, command in COMMANDS.items():
        if "upcycle" in name:
            shutil.rmtree(folders["moe"], ignore_errors=True)
        found = measured(command.format(dense=args.dense, **folders).split(), folders["moe"])
        print(name, found, flush=True)
        lines.append(f"| `{name}` | {found['error'] if 'error' in found else format(found['peak'] / 1e9, '.2f')} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("hf_moe", "transformers", "torch"))
    size = sum(file.stat().st_size for file in folders["moe"].glob("*.safetensors")) / 1e9
    title = (
        f"# Memory of conversions: SmolLM2-135M to {EXPERTS} experts of which {TOP_K} work, {size:.2f} GB in bfloat16"
    )
    args.out.write_text("\n".join([title, "", *lines, "", f"{versions}.", ""]))


if __name__ == "__main__":
    main()
