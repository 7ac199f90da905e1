"""Trainers that publish as `hf-moe push` does: model code, card and record go along, pickles do not."""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy

from hf_moe.hub import MARKER, check_base, plain_errors, push_folder, write_model_card

from ..host import add_push, finish_pushes, in_background, is_pushing, start_repository
from .processor import carry_processor
from .record import write_record

STRATEGIES = (HubStrategy.END, HubStrategy.EVERY_SAVE)


class PublishingMixin:
    """Saves a record of the run beside every model, and pushes folders that load anywhere.

    A new repository is private unless `hub_private_repo` is False. Raises ValueError for a `hub_strategy` that would
    upload the optimizer's state, which is a pickle, and for an adapter whose base model is a folder.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.args.hub_strategy not in STRATEGIES:
            raise ValueError(
                f"hub_strategy is {self.args.hub_strategy.value}, which would upload pickles; it can be "
                f"{' or '.join(strategy.value for strategy in STRATEGIES)}."
            )
        for config in getattr(self.model, "peft_config", {}).values():
            check_base(config.base_model_name_or_path)
        private = self.args.hub_private_repo if private is None else private
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with plain_errors(repo_id, token or self.args.hub_token):
            start_repository(self, token, private is not False)

    def save_record(self, folder: str | Path) -> None:
        """What the run was, in `folder`, and how its model sees; and no draft of a card, which PEFT puts there."""
        write_record(self.facts, self.moe, folder)
        carry_processor(self.moe, folder)
        readme = Path(folder) / "README.md"
        if self.model is not self.moe and readme.is_file() and MARKER not in readme.read_text(encoding="utf-8"):
            readme.unlink()

    def create_model_card(
        self,
        model_name: str | None = None,
        *,
        license: str | None = None,
        language: str | list[str] | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        dataset_name: str | None = None,
        tags: Iterable[str] | str | None = None,
    ) -> None:
        """Write hf_moe's card to `output_dir`, once there is a model in it; a README.md of yours stays.

        The arguments are those of Transformers' and TRL's methods that a folder cannot answer; model_name is taken
        from the repository where there is one.
        """
        folder = Path(self.args.output_dir)
        if not self.is_world_process_zero() or not any(folder.glob("*.safetensors")):
            return
        readme = folder / "README.md"
        if readme.is_file() and MARKER not in readme.read_text(encoding="utf-8"):
            print(f"{readme} is not hf_moe's and stays as it is", file=sys.stderr)
            return
        write_model_card(
            folder,
            name=self.hub_model_id or model_name,
            base_model=finetuned_from,
            license=license,
            datasets=[*listed(dataset), *listed(dataset_name)],
            languages=listed(language),
            tags=listed(tags),
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        """Save to `output_dir` and push that; the arguments of Transformers' method, `card` for create_model_card."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.state.save_to_json(os.path.join(self.args.output_dir, "trainer_state.json"))
        self.create_model_card(tags=self.model.model_tags, **card)
        finish_pushes(self)
        return self.push_folder(Path(self.args.output_dir), commit_message, blocking, token, revision)

    def push_folder(
        self,
        folder: Path,
        message: str,
        blocking: bool,
        token: str | None = None,
        revision: str | None = None,
        remove: bool = False,
    ):
        """The commit, or a future of it, whose failure is said at once; `remove` the folder in the end."""

        def job() -> CommitInfo:
            try:
                return push_folder(
                    folder,
                    self.hub_model_id,
                    private=None,
                    revision=revision or self.args.hub_revision,
                    message=message,
                    token=token or self.args.hub_token,
                )
            except (OSError, ValueError) as error:
                if not blocking:
                    print(error, file=sys.stderr)
                raise
            finally:
                if remove:
                    shutil.rmtree(folder, ignore_errors=True)

        return job() if blocking else in_background(job)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push what a checkpoint holds of the model, while training goes on."""
        if (
            not self.is_world_process_zero()
            or self.args.hub_strategy == HubStrategy.END
            or (is_pushing(self) and not self.args.hub_always_push)
        ):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Its files under other names, since the checkpoint may be deleted before they have been sent.
        aside = Path(self.args.output_dir) / f".push-{self.state.global_step}"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(checkpoint_folder, aside, copy_function=link_or_copy)
        message = f"Training in progress, step {self.state.global_step}"
        add_push(self, self.push_folder(aside, message, blocking=False, remove=True))


def link_or_copy(source: str, target: str) -> None:
    """A second name for the file, or a copy on file systems that have none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def listed(names: Iterable[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
