"""Where a model's files are: a local folder, or a snapshot of the hub."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import HfApi, scan_cache_dir, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from harmful_unlearn.errors import UserError, disk_problem
from harmful_unlearn.storage.files import user_path
from harmful_unlearn.storage.safetensors_io import INDEX_NAME, read_index

TEXT_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
# Of these, what decides how a model reads a text and what it computes.
DECIDE = re.compile(r"config\.json|.*token.*\.(json|model)|(vocab|merges|chat_template)\..*|spiece\.model")
# Some repositories have the weights twice, as consolidated*.safetensors or in subfolders.
WEIGHT_FILES = ["model*.safetensors", "adapter_model*.safetensors"]
CONVERSION_TITLE = "Adding `safetensors` variant of this model"
NO_SAFETENSORS = (
    "{folder} has no .safetensors weights, and pickled ones are not loaded: convert them on a machine "
    "you trust with its transformers class, from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)


def resolve_model(name: str, weights: bool = True) -> Path:
    """The local folder of a model: `name` itself, or the hub's snapshot, downloaded if it is not cached.

    If a hub repository has only pickled weights (OPT's do), the snapshot is that of the pull request in which the
    hub's own converter added safetensors.

    Args:
        name: a local folder or a hub id.
        weights: False downloads only the configuration and the tokenizer of a hub model.

    Raises:
        UserError: no such folder or model, no access, no connection, no safetensors, or an index that names files
            outside of the folder.
    """
    folder = user_path(name)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{name} is a file: give the model's folder or a hub id")
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"there is no folder {name}: check the path, or give a hub id (owner/name)")
        folder = _download(name, weights)
    elif not _has_weights(folder):
        raise UserError(NO_SAFETENSORS.format(folder=folder))
    index = folder / INDEX_NAME.format("model")
    if index.is_file():
        read_index(index)  # transformers itself would read files anywhere
    return folder


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of a model's configuration and of its tokenizer's files, by file name."""
    files = sorted(file for file in folder.iterdir() if DECIDE.fullmatch(file.name) and file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _download(name: str, weights: bool) -> Path:
    try:
        return _snapshot(name, weights)
    except GatedRepoError:
        fix = "accept its licence on its hub page, then set HF_TOKEN or run `hf auth login`"
        raise UserError(f"{name} is gated: {fix}") from None
    except (RepositoryNotFoundError, HFValidationError):
        fix = "check the name (a private model needs HF_TOKEN)"
        raise UserError(f"there is no folder and no hub model {name}: {fix}") from None
    except Exception as error:  # the hub's client passes on the errors of its HTTP library
        if isinstance(error, UserError) or disk_problem(error):
            raise
        problem = f"is no folder here, not in the local cache, and the hub cannot be reached ({type(error).__name__})"
        fix = "check the path, or go online and unset HF_HUB_OFFLINE"
        raise UserError(f"{name} {problem}: {fix}") from error


def _snapshot(name: str, weights: bool) -> Path:
    patterns = TEXT_FILES + (WEIGHT_FILES if weights else [])
    folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    if not weights or _has_weights(folder):
        return folder
    for repository in scan_cache_dir().repos:
        for revision in repository.revisions:
            is_pull_request = any(ref.startswith("refs/pr/") for ref in revision.refs)
            if repository.repo_id == name and is_pull_request and _has_weights(revision.snapshot_path):
                return revision.snapshot_path
    # The author must be the hub's own converter: anybody may open a pull request with that title.
    for discussion in HfApi().get_repo_discussions(name, author="SFconvertbot", discussion_type="pull_request"):
        if discussion.title == CONVERSION_TITLE and discussion.status == "open":
            reference = discussion.git_reference
            return Path(snapshot_download(name, revision=reference, allow_patterns=patterns, ignore_patterns=["*/*"]))
    raise UserError(NO_SAFETENSORS.format(folder=name))
