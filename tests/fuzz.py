"""Random chat rows, and mistakes in configs and tokenizer files, through the commands: success, or one line.

    python tests/fuzz.py [--seed 0] [--rows 2000] [--mutations 2000] [--only r17 m203] [--log FILE]

A case `rN` is a file of one to four rows, which a stage of training or `trace` reads: whatever passes the checks of
the data is trained one step, with everything that a run saves. A case `mN` is a tiny checkpoint, dense or of a family
of mixtures, or a recipe, with mistakes in one file, and one command that reads it. Each follows from the seed and its
own number alone. A finding is whatever leaves a command but an exit code of 0, 1 or 2 with one line on standard error:
a traceback, a death, a hang, more memory than such models take, or something left on the disk after a refusal.

Cases run in a child process, a few dozen each, so that a death of the process is a finding, too. The network is off.
"""

import argparse
import collections
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
import datasets
import torch
from hf_moe.conversion import upcycle
from hf_moe.training.stages import distil, dpo, grpo, pretrain, sft  # noqa: F401  (once, not in each child)
from hf_moe_cli import main as hf_moe
from transformers.utils import logging

from hf_moe.demo import DEMO_MODEL
from tests import fuzz_files, fuzz_rows
from tests.conversion.conftest import DEEPSEEK_CASES, DENSE_CASES, MOE_CASES, OTHER_CASES, build

BATCH = 40  # cases of one child
SECONDS = 60  # of one case: a hundred times what it takes on an idle core
MEMORY = 6 * 2**30  # bytes of addresses of one case, beyond those after the imports
LONGEST_LINE = 3000  # characters of one line: more is no line for a person
STAGES = ("sft", "dpo", "grpo", "distil", "pretrain")
FAMILIES = {
    "dense": ("llama", "qwen3", "gemma3", "mistral"),
    "moe": ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "glm4_moe", "llama4_text", "dbrx"),
}
COMMON = ("train", "trace", "card", "inspect", "verify")
COMMANDS = {
    "dense": ("upcycle", "upcycle", "upcycle", *COMMON),
    "moe": ("import", "import", "import", *COMMON),
    "hf_moe": ("export", "train", "train", "train", *COMMON),
}
# What makes a run one short step, of every stage and of each.
ONE_STEP = ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--logging_steps", "1", "--use_cpu", "true"]
SHORT = {
    "sft": "--max_steps 1 --max_length 64",
    "distil": "--max_steps 1 --max_length 64",
    "dpo": "--max_steps 1 --max_length 64",
    "grpo": "--max_steps 1 --num_generations 2 --max_completion_length 4",
    "pretrain": "--from_scratch false --learning_rate 1e-3 --train_tokens 128 --batch_tokens 128 --max_length 64",
}


class Hang(BaseException):
    pass


# ---- the cases ----


def bases(folder: Path) -> dict[str, list[Path]]:
    """Tiny checkpoints to make mistakes in, by kind. All have the demo's tokenizer."""
    cases = {**DENSE_CASES, **MOE_CASES, **DEEPSEEK_CASES, **OTHER_CASES}
    made = {"dense": [DEMO_MODEL], "moe": [], "hf_moe": [folder / "upcycled"]}
    for kind, names in FAMILIES.items():
        for name in names:
            model_type, changes = cases[name]
            build(model_type, **changes, vocab_size=512).save_pretrained(folder / name)
            for file in DEMO_MODEL.glob("*token*"):
                shutil.copy(file, folder / name)
            shutil.copy(DEMO_MODEL / "chat_template.jinja", folder / name)
            made[kind].append(folder / name)
    for source, target in ((DEMO_MODEL, "upcycled"), (folder / "llama", "tiny")):
        upcycle(source, folder / target, experts=2, top_k=1, verify=False, progress=False)
    made["hf_moe"].append(folder / "tiny")
    (folder / "story.txt").write_text("Once upon a time there was a cat.\n")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (sentence("Hello."), sentence("Say a word.", "tree")))
    )
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "Say ", "chosen": "a word", "rejected": "b"}) + "\n")
    (folder / "asked.jsonl").write_text(json.dumps({"prompt": "Say "}) + "\n")
    (folder / "texts.jsonl").write_text((json.dumps({"text": "Once upon a time there was a cat. " * 20}) + "\n") * 4)
    return made


def sentence(asked: str, said: str = "hello") -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def training(stage: str, model: Path, data: Path, out: Path, teacher: Path, recipe: Path | None = None) -> list:
    words = ["train", recipe or f"tiny/{stage}", "--model_name_or_path", model, "--train_data", data]
    words += ["--teacher_model_name_or_path", teacher] if stage == "distil" else []
    return [*words, "--output_dir", out, *ONE_STEP, *SHORT[stage].split()]


def random_rows(random: Random) -> tuple[str, float, list]:
    """The stage that reads them, how odd they are, and the rows."""
    stage, odd = random.choice((*STAGES * 2, "sft", "trace")), random.choice((0.0, 0.02, 0.1, 0.4))
    return stage, odd, fuzz_rows.Rows(random, odd).rows(stage, random.randint(1, 4))


def row_case(random: Random, folder: Path, work: Path) -> tuple[list, int]:
    """The words of a command, and how many rows it reads."""
    stage, odd, rows = random_rows(random)
    data = fuzz_rows.write(rows, work, random, odd)
    if stage == "trace":
        return ["trace", folder / "tiny", "--data", data, "--out", work / "out", "--max-tokens", "64"], len(rows)
    return training(stage, folder / "tiny", data, work / "out", folder / "llama"), len(rows)


def mutation_case(random: Random, folder: Path, work: Path, made: dict[str, list[Path]]) -> list:
    """The words of a command."""
    files = {"dpo": "pairs.jsonl", "grpo": "asked.jsonl", "pretrain": "texts.jsonl"}
    stage, out = random.choice(STAGES), work / "out"
    data = folder / files.get(stage, "rows.jsonl")
    if random.random() < 0.1:
        recipe = ROOT / "training" / "recipes" / "tiny" / f"{stage}.yaml"
        fuzz_files.mutate_recipe(recipe, work / "recipe.yaml", random)
        if random.random() < 0.7:
            return ["train", "--check", work / "recipe.yaml"]
        return training(stage, folder / "tiny", data, out, folder / "llama", work / "recipe.yaml")
    kind = random.choice(sorted(COMMANDS))
    base, command = random.choice(made[kind]), random.choice(COMMANDS[kind])
    model = Path(shutil.copytree(base, work / "model"))
    for file in model.iterdir():
        file.chmod(0o644)
    fuzz_files.mutate_checkpoint(model, random)
    words = {
        "upcycle": ["upcycle", model, out, "--experts", "2", "--top-k", "1", "--dry-run"],
        "import": ["import", model, out, "--dry-run"],
        "export": ["export", model, out, "--to", random.choice(("mixtral", "qwen3_moe", "olmoe")), "--dry-run"],
        "trace": ["trace", model, "--data", folder / "story.txt", "--out", out, "--max-tokens", "64"],
        "card": ["card", model],
        "inspect": ["inspect", model],
        "verify": ["verify", *((base, model) if random.random() < 0.5 else (model, base))],
        "train": training(stage, model, data, out, base),
    }
    return words[command]


# ---- running one ----


def run(words: list[str], work: Path) -> tuple[int | None, str, BaseException | None]:
    """Exit code, what the command wrote to standard error, and what escaped it."""
    (work.parent / "err").mkdir(exist_ok=True)
    path, escaped, code = work.parent / "err" / "text", None, None
    kept, streams = (os.dup(1), os.dup(2)), (sys.stdout, sys.stderr)
    with path.open("w+b") as file:
        for stream in (1, 2):  # below Python, where a library of another language writes, too
            os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(os.dup(x), "wb"), errors="replace") for x in (1, 2))
        signal.alarm(SECONDS)
        try:
            code = hf_moe(words)
        except BaseException as error:
            escaped = error
        finally:
            signal.alarm(0)
            sys.stdout.close()
            sys.stderr.close()
            sys.stdout, sys.stderr = streams
            for number, stream in enumerate(kept, 1):
                os.dup2(stream, number)
                os.close(stream)
    return code, path.read_text(errors="replace"), escaped


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (0, 0) if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def ours(error: BaseException) -> str:
    """Where in this project an exception comes from: its innermost frame here."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ROOT)]
    frames = [f for f in frames if not f.filename.startswith(str(ROOT / "tests"))]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].name}" if frames else "nowhere"


def judge(words: list[str], work: Path) -> dict:
    """Run a command and say what is wrong with how it ended, if anything."""
    before = listing(work)
    start = time.perf_counter()
    code, said, escaped = run(words, work)
    found = {"code": code, "seconds": round(time.perf_counter() - start, 2), "words": words, "finding": None}
    mistakes = re.findall(r"^hf-moe: .*", said, re.MULTILINE)
    found["said"] = mistakes[-1] if mistakes else said[-300:]
    changed = sorted(name for name, stat in listing(work).items() if before.get(name) != stat)
    changed = [name for name in changed if code != 0 or name.startswith("tmp/") or Path(name).match("*.partial*")]
    if escaped is not None:
        name = type(escaped).__name__
        found["finding"] = f"{name} from {ours(escaped)}"
        found["said"] = " ".join(str(escaped).split())[:300]
        found["trace"] = "".join(traceback.format_exception(escaped))
    elif code not in (0, 1, 2):
        found["finding"] = f"exit code {code}"
    elif "Traceback (most" in said:
        found["finding"] = "a traceback on standard error"
        found["trace"] = said
    elif code and len(mistakes) != 1:
        found["finding"] = f"{len(mistakes)} lines that begin with hf-moe:"
        found["trace"] = said
    elif code and (said.rstrip().splitlines()[-1] != mistakes[0].rstrip() or len(mistakes[0]) > LONGEST_LINE):
        found["finding"] = "more than one line, or one that is too long"
        found["trace"] = said[-5000:]
    elif code and mistakes[0].strip() in ("hf-moe:", "hf-moe: ValueError", "hf-moe: OSError"):
        found["finding"] = "a line that says nothing"
    elif changed:
        found["finding"] = f"left on the disk by {words[0]} with exit code {code}"
        found["said"] += f" | {', '.join(changed[:5])}"
    return found


def one_case(name: str, seed: int, folder: Path, made: dict[str, list[Path]]) -> dict:
    random = Random(f"{seed} {name}")
    work = folder / "case"
    shutil.rmtree(work, ignore_errors=True)
    (work / "tmp").mkdir(parents=True)
    tempfile.tempdir = str(work / "tmp")
    words, rows = row_case(random, folder, work) if name[0] == "r" else (mutation_case(random, folder, work, made), 0)
    torch.manual_seed(0)
    return {"case": name, "rows": rows} | judge([str(word) for word in words], work)


# ---- running many ----


def child(names: list[str], seed: int, folder: Path, made: dict[str, list[Path]], pipe: int) -> None:
    def hang(*_):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in names:
        os.write(pipe, (json.dumps(one_case(name, seed, folder, made)) + "\n").encode())


def results(names: list[str], seed: int, folder: Path, made: dict[str, list[Path]]):
    """What came of each case, in order. What kills its process is found by the case that is missing."""
    names = list(names)
    while names:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            status = 1
            try:
                child(names[:BATCH], seed, folder, made, writer)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)
        done, asked = 0, min(BATCH, len(names))
        with os.fdopen(reader, "rb", buffering=0) as file:
            rest = b""
            while True:
                if not select.select([file], [], [], SECONDS + 30)[0]:
                    os.kill(pid, signal.SIGKILL)
                    break
                piece = os.read(file.fileno(), 1 << 16)
                if not piece:
                    break
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    done += 1
                    yield json.loads(line)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if done < asked:
            what = f"the process died: {'signal' if status < 0 else 'exit code'} {abs(status)}"
            yield {
                "case": names[done],
                "rows": 0,
                "code": None,
                "seconds": 0,
                "said": "",
                "finding": what,
                "words": [],
            }
            done += 1
        names = names[done:]


def row_names(seed: int, rows: int) -> list[str]:
    """As many cases as hold so many rows."""
    names, count = [], 0
    while count < rows:
        names.append(f"r{len(names)}")
        count += len(random_rows(Random(f"{seed} {names[-1]}"))[-1])
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--only", nargs="+", metavar="CASE", help="run these, and print what they say")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write what came of each case, a JSON object a line")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    names = given.only or [*row_names(given.seed, given.rows), *(f"m{number}" for number in range(given.mutations))]
    start, codes, findings = time.perf_counter(), collections.Counter(), collections.defaultdict(list)
    rows = 0
    with tempfile.TemporaryDirectory() as folder, open(given.log or os.devnull, "w") as log:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "datasets"
        made = bases(Path(folder))
        for found in results(names, given.seed, Path(folder), made):
            log.write(json.dumps(found) + "\n")
            log.flush()
            codes[found["code"]] += 1
            rows += found["rows"]
            if given.only:
                print(found["case"], "hf-moe", *found["words"])
                print(f"  code {found['code']} in {found['seconds']} s: {found['said']}")
                print(found.get("trace", ""))
            if found["finding"]:
                findings[found["finding"]].append(found)
    for what, cases in sorted(findings.items(), key=lambda item: -len(item[1])):
        print(f"{len(cases):>4}  {what}")
        for found in cases[:3]:
            print(f"      --only {found['case']}: {found['said'][:200]}")
    counts = ", ".join(f"{count} with exit code {code}" for code, count in sorted(codes.items(), key=str))
    minutes = (time.perf_counter() - start) / 60
    total = sum(map(len, findings.values()))
    print(
        f"seed {given.seed}: {rows} rows in {sum(n[0] == 'r' for n in names)} files, "
        f"{sum(n[0] == 'm' for n in names)} mutations: {counts}; {total} findings; {minutes:.1f} minutes"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
