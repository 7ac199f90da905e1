"""The tests on other releases of the hosts, as a table: `python tests/host_matrix.py 5.21.0 5.23.0 trl==1.16.0`.

A version alone is one of Transformers. Each release is installed without its requirements into a folder of its own,
which goes first on the path, beside what is installed here. By default the tests that touch the host; --all takes the
whole suite, and words after -- go to pytest.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Generation, saving, trainers, conversion, saved folders, commands.
HOST_TESTS = (
    *(f"tests/model/test_{name}.py" for name in ("host", "generation", "saving", "multi_token", "latent_attention")),
    *("tests/saved", "tests/generation", "tests/cli/test_check.py", "tests/cli/test_demo.py"),
    *(f"tests/conversion/test_{name}.py" for name in ("verify", "families", "export", "upcycle")),
    *(f"tests/training/test_{name}.py" for name in ("host", "trainer", "resume", "sft", "dpo", "grpo", "adapters")),
    *(
        "tests/test_fast_generation.py",
        "tests/kernels/test_host_models.py",
        "tests/kernels/test_low_rank.py",
        "tests/kernels/test_varlen.py",
        "tests/telemetry/test_report.py",
        "tests/test_routers.py",
        "tests/graft/test_model.py",
        "tests/graft/test_pictures.py",
        "tests/graft/test_training.py",
    ),
)
HOSTS = ("torch", "transformers", "accelerate", "huggingface-hub", "trl", "peft", "datasets")
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)")


def requirement(word: str) -> str:
    return f"transformers=={word}" if re.fullmatch(r"\d[\w.]*", word) else word


def run(release: str, tests: list[str], folder: Path) -> dict[str, int]:
    """Passed, failed and skipped tests and the minutes they took, with `release` first on the path."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(folder), release]
    subprocess.run(pip, check=True)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *tests]
    start = time.perf_counter()
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True, stdout=subprocess.PIPE
    )
    minutes = (time.perf_counter() - start) / 60
    last = result.stdout.strip().splitlines()[-1]
    counts = {name.rstrip("s"): int(number) for number, name in COUNT.findall(last)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if result.returncode != 0:
        sys.stderr.write(result.stdout[-6000:])
        failed = failed or 1
    return {"passed": counts.get("passed", 0), "failed": failed, "skipped": counts.get("skipped", 0), "min": minutes}


def main() -> int:
    ours = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours.add_argument("releases", nargs="*", metavar="RELEASE")
    ours.add_argument("--all", action="store_true", help="the whole suite")
    ours.add_argument("--list", action="store_true", help="print the tests that touch the host, and run nothing")
    words = sys.argv[1:]
    further = words[words.index("--") + 1 :] if "--" in words else []
    given = ours.parse_args(words[: words.index("--")] if "--" in words else words)
    if given.list:
        print(*HOST_TESTS)
        return 0
    tests = [*(["tests"] if given.all else HOST_TESTS), *further]
    print("beside", ", ".join(f"{name} {version(name)}" for name in HOSTS), file=sys.stderr)
    print("| release | passed | failed | skipped | minutes |\n|---|--:|--:|--:|--:|", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for release in map(requirement, given.releases):
            found = run(release, tests, Path(folder, release))
            failed += found["failed"]
            cells = (
                release.replace("==", " "),
                found["passed"],
                found["failed"],
                found["skipped"],
                f"{found['min']:.0f}",
            )
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
