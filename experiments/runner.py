"""Runs an experiment: every arm with every seed, several at a time; what is done is kept, and not done again."""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from hf_moe.plugins import loaded_plugins
from hf_moe.staging import written_aside
from hf_moe.version import __version__

from .experiment import Arm, Budget, Experiment
from .text import read_text
from .trial import ON_GPU, Job, size_of, train
from .verdicts import Runs

FILE = "results.json"
EQUAL = 0.02  # of the largest


def run(
    name: str, experiment: Experiment, budget: Budget, data: str | None, out: Path, progress: bool = True
) -> dict[str, Any]:
    """Train what is left to train and judge; returns what stands in `out`/results.json.

    Raises ValueError where `out` holds another experiment, or arms are not equal in what they must be.
    """
    arms = experiment.arms(budget)
    sizes = {arm: size_of(what, budget) for arm, what in arms.items()}
    check_equal(experiment, sizes)
    said = {
        "experiment": name,
        "claim": experiment.claim,
        "source": experiment.source,
        "paper": experiment.paper,
        "budget": asdict(budget),
        "data": data or "generated stories",
        "arms": {arm: what.said() for arm, what in arms.items()},
        "sizes": sizes,
        "draws_experts": experiment.experts,
    }
    done = read(out / FILE, said)
    known = {(x["arm"], x["seed"]) for x in done}
    left = [(arm, seed) for arm in arms for seed in range(budget.seeds) if (arm, seed) not in known]

    def keep(found: dict[str, Any]) -> None:
        done.append(found)
        write(out / FILE, said | {"versions": versions(), "runs": done})

    out.mkdir(parents=True, exist_ok=True)
    if left:
        with tempfile.TemporaryDirectory() as text:
            read_text(data, budget).save(Path(text))
            given = (budget, Path(text), experiment.measure, loaded_plugins())
            work([Job(arm, seed, arms[arm], *given) for arm, seed in left], keep, progress)
    runs = by_arm(done, arms)
    result = said | {"versions": versions(), "verdict": experiment.judge(runs), "says": experiment.says(runs)}
    result |= {"runs": done}
    write(out / FILE, result)
    return result


def by_arm(done: list[dict[str, Any]], arms: dict[str, Arm]) -> Runs:
    """In the order of the arms and of the seeds."""
    return {arm: sorted((x for x in done if x["arm"] == arm), key=lambda x: x["seed"]) for arm in arms}


def check_equal(experiment: Experiment, sizes: dict[str, dict[str, int]]) -> None:
    if experiment.equal is None:
        return
    found = {arm: size[experiment.equal] for arm, size in sizes.items()}
    if max(found.values()) - min(found.values()) > EQUAL * max(found.values()):
        raise ValueError(f"The arms must have equal {experiment.equal}, but have {found}.")


def versions() -> dict[str, str]:
    card = torch.cuda.get_device_name() if ON_GPU else "CPU"
    return {
        "hf_moe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": card,
    }


def work(jobs: list[Job], keep: Callable[[dict[str, Any]], None], progress: bool) -> None:
    """Do the jobs, as many at a time as there are cores, on a GPU half as many; `keep` each as it ends."""
    cores = len(os.sched_getaffinity(0))
    at_once = min(8, max(1, cores // 2)) if ON_GPU else cores
    bar = tqdm(total=len(jobs), unit="run", disable=not progress)
    context = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
    with ProcessPoolExecutor(min(at_once, len(jobs)), context) as pool, bar:
        waiting = [pool.submit(train, job) for job in jobs]
        try:
            for ended in as_completed(waiting):
                keep(ended.result())
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read(path: Path, said: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs in a file of the same experiment; none where there is no file."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    known = json.loads(json.dumps({key: said[key] for key in ("experiment", "budget", "data", "arms")}))
    for key, value in known.items():
        if found.get(key) != value:
            raise ValueError(f"{path} is of a run with another {key}: name another --out, or remove it.")
    return found["runs"]


def write(path: Path, result: dict[str, Any]) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
