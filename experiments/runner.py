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

from tqdm import tqdm

from hf_moe.plugins import loaded_plugins
from hf_moe.staging import written_aside

from .experiment import Budget, Experiment
from .text import read_text
from .trial import ON_GPU, Job, size_of, train
from .verdicts import Runs, differ

FILE = "results.json"
ON_CARD = 6  # runs that share an H200: a step takes 34 ms alone, 43 beside five others, 80 beside seven


class Begun:
    """An experiment in its folder, with what is done of it.

    Raises ValueError where the folder holds another one, or arms are not equal in what they must be.
    """

    def __init__(self, name: str, experiment: Experiment, budget: Budget, data: str | None, out: Path):
        self.experiment, self.budget, self.out, self.arms = experiment, budget, out, experiment.arms(budget)
        sizes = {arm: size_of(what, budget) for arm, what in self.arms.items()}
        check_equal(experiment, sizes)
        self.said = {
            "experiment": name,
            "claim": experiment.claim,
            "source": experiment.source,
            "paper": experiment.paper,
            "budget": asdict(budget),
            "data": data or "generated stories",
            "arms": {arm: what.said() for arm, what in self.arms.items()},
            "sizes": sizes,
            "draws_experts": experiment.experts,
        }
        self.done = read(out / FILE, self.said)
        out.mkdir(parents=True, exist_ok=True)

    def left(self, text: Path) -> list[Job]:
        """The runs that are not done."""
        known = {(x["arm"], x["seed"]) for x in self.done}
        given = (self.budget, text, self.experiment.measure, loaded_plugins())
        wanted = [(arm, seed) for arm in self.arms for seed in range(self.budget.seeds)]
        return [Job(arm, seed, self.arms[arm], *given) for arm, seed in wanted if (arm, seed) not in known]

    def keep(self, found: dict[str, Any]) -> None:
        self.done.append(found)
        write(self.out / FILE, self.said | {"runs": self.done})

    @property
    def runs(self) -> Runs:
        """In the order of the arms and of the seeds."""
        return {arm: sorted((x for x in self.done if x["arm"] == arm), key=lambda x: x["seed"]) for arm in self.arms}

    def judged(self) -> dict[str, Any]:
        """What stands in the folder's results.json in the end."""
        said = {"verdict": self.experiment.judge(self.runs), "says": self.experiment.says(self.runs)}
        result = self.said | said | {"runs": self.done}
        write(self.out / FILE, result)
        return result


def run(begun: list[Begun], data: str | None, progress: bool = True) -> None:
    """Train what is left to train of experiments with one budget, of all of them at a time."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(one.keep, job) for one in begun for job in one.left(Path(folder))]
        if jobs:
            read_text(data, begun[0].budget).save(Path(folder))
            work(jobs, progress)


def check_equal(experiment: Experiment, sizes: dict[str, dict[str, int]]) -> None:
    if experiment.equal is None:
        return
    found = {arm: size[experiment.equal] for arm, size in sizes.items()}
    if differ(found.values()):
        raise ValueError(f"The arms must have equal {experiment.equal}, but have {found}.")


def work(jobs: list[tuple[Callable[[dict[str, Any]], None], Job]], progress: bool) -> None:
    """Do the jobs, as many at a time as there are cores, on a GPU ON_CARD; each is kept as it ends."""
    cores = len(os.sched_getaffinity(0))
    at_once = min(ON_CARD, cores) if ON_GPU else cores
    bar = tqdm(total=len(jobs), unit="run", disable=not progress)
    context = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
    with ProcessPoolExecutor(min(at_once, len(jobs)), context) as pool, bar:
        waiting = {pool.submit(train, job): keep for keep, job in jobs}
        try:
            for ended in as_completed(waiting):
                waiting[ended](ended.result())
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
