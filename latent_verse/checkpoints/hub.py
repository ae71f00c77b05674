"""The Hugging Face hub: fetching a saved model by its id, and pushing one. A path that is absent is never asked for."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from latent_verse.checkpoints.checks import CheckpointError
from latent_verse.checkpoints.shipped import shipped_folders
from latent_verse.config.messages import closest, printable, reason, shown
from latent_verse.config.train import TrainerConfig

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
ANSWERS_WITHIN = 10.0  # seconds: snapshot_download alone would wait for ever for a hub that takes calls and is silent
CARD = "README.md"
RUNS = TrainerConfig.log_dir  # where runs are by default: what is absent there, or before a first run, is no hub id


def fetch_from_hub(name: str, files: Iterable[str], wanted: str) -> Path:
    """Fetch files (names or patterns) of a hub id into Hugging Face's cache. Returns their folder.

    Only what can be an id is asked for: `owner/name`, of which `owner` is no folder here. If the hub has not answered
    within ANSWERS_WITHIN seconds, or answers with an error, an earlier copy in the cache is taken.

    Args:
        wanted: what to give instead, for messages: "a folder of save_pretrained".

    Raises:
        CheckpointError: `name` is an absent path, or cannot be fetched; the message says what is there instead.
    """
    owner, like_id = name.partition("/")[0], HUB_ID.fullmatch(name) and not name.endswith((".ckpt", ".safetensors"))
    if not like_id or os.path.isdir(owner) or owner == RUNS:
        why = f" ({owner} is a folder here, so it is not looked for on the hub)" if like_id and owner != RUNS else ""
        remedy = " or ".join([f"Give {wanted}, a hub id (owner/name)", *shipped_folders()]) + "."
        raise CheckpointError(f"{printable(name)} does not exist{why}{_nearest(name)} {remedy}")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        try:
            HfApi().model_info(name, timeout=ANSWERS_WITHIN)
        except RepositoryNotFoundError:
            raise
        except Exception as out_of_reach:  # its HTTP client, another one in newer versions, raises its own
            try:
                return Path(snapshot_download(name, allow_patterns=list(files), local_files_only=True))
            except LocalEntryNotFoundError:
                raise out_of_reach from None
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except RepositoryNotFoundError as error:
        why = "there is none of that name, or it is private and you are not logged in (hf auth login)"
        raise CheckpointError(_nowhere(name, why)) from error
    except Exception as error:  # huggingface_hub and its HTTP client each raise their own
        raise CheckpointError(_nowhere(name, reason(error))) from error


def _nowhere(name: str, why: str) -> str:
    absent = f"{name} is neither a file nor a folder here, nor a hub id that can be fetched"
    return f"{absent}: {why.rstrip('.')}{_nearest(name)}"


def _nearest(path: str) -> str:
    """'. Did you mean X?' for the path or shipped model that is nearest to an absent path, or a full stop."""
    parts = Path(path.replace("\\", "/")).parts
    with contextlib.suppress(OSError, ValueError):  # no folder, not readable, or no path at all
        known = next((n for n in range(len(parts), 0, -1) if os.path.exists(Path(*parts[:n]))), 0)
        if known == len(parts):
            return f". Did you mean {Path(*parts)}?"
        folder, rest = Path(*parts[:known]), parts[known + 1 :]
        there = [entry for entry in os.listdir(folder) if not entry.startswith(".")]
        there += shipped_folders() if len(parts) == 1 else ()
        whole = [str(Path(entry, *rest)) for entry in there if rest and os.path.exists(Path(folder, entry, *rest))]
        prefix = f"{folder}/" if known else ""
        for absent, names in ((str(Path(*parts[known:])), whole), (parts[known], there)):
            if near := closest(absent, names, prefix, otherwise=""):
                return near
    return "."


class PushToHub:
    """`push_to_hub`, for models that have `save_pretrained` and `model_card`."""

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the model to a folder."""
        raise NotImplementedError

    def model_card(self, name: str) -> str:
        """The text of a model card for the repository `name`."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Push model",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub as one commit, and return its URL.

        `from_pretrained(repo_id)` loads it again. A model card is added if there is none.

        Args:
            repo_id: "owner/name"; made if it is not there.
            private: whether a new repository is. None is the owner's default.
            token: None takes the one you are logged in with.
            create_pr: open a pull request, whose URL is then returned.

        Raises:
            CheckpointError: there is no token, the name cannot be used, or the hub refuses it or is out of reach.
            CheckpointError, FileError, ConfigError: as `save_pretrained`; nothing was made on the hub then.
        """
        import huggingface_hub
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(repo_id if isinstance(repo_id, str) else "")
        except HFValidationError as error:
            raise CheckpointError(f"repo_id is {shown(repo_id)}; give owner/name. {reason(error)}") from error
        if token is None and huggingface_hub.get_token() is None:
            remedy = "Log in with `hf auth login`, set HF_TOKEN, or give token."
            raise CheckpointError(f"{repo_id} cannot be pushed: there is no token for the hub. {remedy}")
        with tempfile.TemporaryDirectory(prefix="latent-verse-") as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder)
            api = huggingface_hub.HfApi(token=token, library_name="latent-verse")
            try:
                name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if not api.file_exists(name, CARD):  # whoever wrote one knows more of the model
                    (folder / CARD).write_text(self.model_card(name), encoding="utf-8")
                commit = api.upload_folder(
                    repo_id=name, folder_path=folder, commit_message=commit_message, create_pr=create_pr
                )
            except Exception as error:  # huggingface_hub and its HTTP client each raise their own
                raise CheckpointError(f"{repo_id} cannot be pushed to the hub: {reason(error)}") from error
        return str(commit.pr_url or commit.commit_url)


def model_card(name: str, about: Iterable[str], use: str, tags: list[str], pipeline_tag: str | None = None) -> str:
    """A model card: metadata that the hub reads, what the model is, and how it is loaded.

    Args:
        about: one line for each part.
        use: Python code.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(library_name="latent-verse", tags=["l-verse", *tags], pipeline_tag=pipeline_tag)
    lines = "\n".join(f"- {line}" for line in about)
    origin = "A model of [L-Verse](https://arxiv.org/abs/2111.11133) (Kim et al., CVPR 2022)."
    return f"---\n{metadata}\n---\n\n# {name}\n\n{origin}\n\n{lines}\n\n```python\n{use}\n```\n"
