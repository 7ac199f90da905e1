"""`push_to_hub` of hf_moe's model classes."""

import contextlib
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

from .card import write_model_card
from .folder import MARKER
from .upload import plain_errors, push_folder


def push_to_hub(
    self: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload the model with its code and a model card; the arguments of Transformers' method of this name.

    A new repository is private unless `private` is False. A README.md that is there and not hf_moe's stays. Raises
    ValueError or OSError of one line, in which no token stands.
    """
    token = token if isinstance(token, str) else None
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, max_shard_size=max_shard_size)
        with plain_errors(repo_id, token):
            repo_id = HfApi(token=token).create_repo(repo_id, private=private is not False, exist_ok=True).repo_id
            with contextlib.suppress(EntryNotFoundError):
                shutil.copyfile(hf_hub_download(repo_id, "README.md", token=token), Path(folder, "README.md"))
        readme = Path(folder, "README.md")
        if not readme.exists() or MARKER in readme.read_text(encoding="utf-8"):
            write_model_card(folder, name=repo_id, tags=[*(self.model_tags or []), *(tags or [])])
        return push_folder(
            Path(folder),
            repo_id,
            private=None,
            revision=revision,
            message=commit_message,
            token=token,
            commit_description=commit_description,
            create_pr=create_pr,
        )
