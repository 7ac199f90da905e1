"""Upload of a saved folder to the Hub: checked first, private by default, resumable, without a word of a token."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..chat import plain_templates
from .card import install, render_card
from .checks import check_folder
from .folder import MARKER
from .redaction import redacted, redacted_messages

# What a status of the Hub means, and the way out.
STATUS = {
    401: "the Hub does not take this token: log in again (`hf auth login`), or set HF_TOKEN to another",
    403: "this token may not write there: use one with write permission",
    404: "there is no such repository or revision, or this token may not see it",
    413: "the Hub takes no files or requests of this size: save the model in smaller shards (max_shard_size)",
    429: "too many requests: wait, then push again; what has arrived is not sent again",
}
SERVER = "the Hub failed: push again later; what has arrived is not sent again"


def push(
    folder: str | Path,
    repo_id: str,
    *,
    dry_run: bool = False,
    private: bool = True,
    revision: str | None = None,
    checkpoints: bool = False,
    message: str = "Upload model",
    token: str | None = None,
) -> dict[str, Any]:
    """Upload a saved model, adapter or expert rows with code, card and figures; returns a report for JSON.

    repo_id: "name" or "namespace/name"; it is made if it does not exist, private unless `private` is False. revision:
    a branch, made if it does not exist. checkpoints: the checkpoint folders, too. dry_run: look at everything, touch
    neither the folder nor the network. token: in place of the one that is set or stored.

    README.md is written anew under the repository's name, unless it is the user's own. Weights that an interrupted
    push has sent are not sent again. Raises ValueError or OSError of one line, in which no token stands: a folder that
    would not load, a name that the Hub does not allow, no token, a refusal, a failure on the way.
    """
    with prepared(Path(folder), repo_id, checkpoints) as (written, files, left_out):
        sizes = {name: path.stat().st_size for name, path in files.items()}
        report = {
            "repo_id": repo_id,
            "revision": revision or constants.DEFAULT_REVISION,
            "private": private,
            "dry_run": dry_run,
            "files": sizes,
            "left_out": left_out,
            "bytes": sum(sizes.values()),
        }
        if dry_run:
            return report
        commit, found = send(Path(folder), written, list(files), repo_id, private, revision, message, token)
    return report | found | {"commit": commit.oid}


def push_folder(folder: Path, repo_id: str, *, private: bool | None, **how: Any) -> CommitInfo:
    """As `push`, for Python: returns the Hub's commit. private: None leaves a repository that exists as it is.

    how: revision, message and token, and options of huggingface_hub's `create_commit`.
    """
    with prepared(folder, repo_id, checkpoints=False) as (written, files, _):
        return send(folder, written, list(files), repo_id, private, **how)[0]


@contextlib.contextmanager
def prepared(folder: Path, repo_id: str, checkpoints: bool) -> Iterator[tuple[Path, dict[str, Path], dict[str, str]]]:
    """Check the folder and write its card aside: where that is, the files to upload, and what is left out and why."""
    validate_repo_id(repo_id)
    files, left_out = check_folder(folder, checkpoints)
    with tempfile.TemporaryDirectory() as aside:
        readme = folder / "README.md"
        if not readme.exists() or MARKER in readme.read_text(encoding="utf-8"):
            render_card(folder, Path(aside), name=repo_id)
        for part in {Path(name).parent for name in files}:
            for name, text in plain_templates(folder / part).items():
                (aside / part / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / part / name).write_text(text, encoding="utf-8")
        written = {str(path.relative_to(aside)): path for path in Path(aside).rglob("*") if path.is_file()}
        found = {name: written.get(name, folder / name) for name in sorted({*files, *written})}
        yield Path(aside), found, left_out


def send(
    folder: Path,
    written: Path,
    names: list[str],
    repo_id: str,
    private: bool | None,
    revision: str | None = None,
    message: str = "Upload model",
    token: str | None = None,
    **commit_options: Any,
) -> tuple[CommitInfo, dict[str, Any]]:
    """Put the card into the folder, make repository and branch where they do not exist, and upload.

    Returns the commit, and repo_id, url and private as the Hub has them.
    """
    token = token or get_token()
    if token is None:
        raise OSError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    install(written, folder)
    with plain_errors(repo_id, token), redacted_messages(token):
        api = HfApi(token=token, library_name="hf_moe")
        repo_id = api.create_repo(repo_id, private=private is not False, exist_ok=True).repo_id
        is_private = api.model_info(repo_id).private
        if private and not is_private:
            raise ValueError(f"{repo_id} is public already; say that it may be (--public, private=False).")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        check_metadata(folder / "README.md")
        # Shard by shard, so that each one is the Hub's for good when the next one starts, whichever protocol sends
        # them; then one commit, so that nobody ever sees half of a model.
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        for operation in operations:
            if operation.path_in_repo.endswith(".safetensors"):
                api.preupload_lfs_files(repo_id, additions=[operation], revision=revision)
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, **commit_options)
        return commit, {"repo_id": repo_id, "url": f"{api.endpoint}/{repo_id}", "private": is_private}


@contextlib.contextmanager
def plain_errors(repo_id: str, token: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub and hf_xet raise into a ValueError or OSError of one line without a token.

    Their own exceptions, which hold the request and its headers, are not kept as a cause.
    """
    try:
        yield
    except OfflineModeIsEnabled:
        failure = OSError("The Hub was not asked: offline mode is on; unset HF_HUB_OFFLINE.")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        failure = kind(redacted(explain(error, repo_id), token))
    else:
        return
    raise failure


def check_metadata(readme: Path) -> None:
    """Raises a ValueError where the Hub would refuse the card, which is better known before the weights are sent."""
    try:
        ModelCard.load(readme).validate()
    except ValueError as error:
        raise ValueError(f"The Hub refuses the metadata of {readme}: {one_line(error)}") from None


def explain(error: Exception, repo_id: str) -> str:
    """One line: what was done, the status with its way out or the reason, and what the Hub said."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    http = next((x for x in chain if isinstance(x, HfHubHTTPError)), None)
    if http is None:
        cut_off = any(isinstance(x, HTTPError) for x in chain)
        reason = "the Hub cannot be reached, or hung up" if cut_off else ""
        said = one_line(chain[0])
        if isinstance(error, ValueError):
            return said
        return f"{repo_id} was not pushed: {': '.join(filter(None, [reason, said]))}"
    status = http.response.status_code
    meaning = STATUS.get(status, SERVER if status >= 500 else "the Hub refused")
    said = f" (it said: {one_line(http.server_message)})" if http.server_message else ""
    where = f" at {one_line(error)}" if error is not http else ""
    return f"{repo_id} was not pushed{where}: {status}, {meaning}{said}."


def one_line(said: object) -> str:
    return " ".join(str(said).split()) or type(said).__name__
