"""The model hub: reachability, errors as one sentence each, and hashes of weights."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import constants, errors, try_to_load_from_cache, utils

from fedpeft.errors import PartlyPublic
from fedpeft.files import not_below, read_json

PATIENCE = 5.0  # seconds; transformers' retries take over 20 a file


@cache
def reachable() -> bool:
    """Ask once a process whether the hub answers; with HF_HUB_OFFLINE=1 the answer is no."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # each HTTP library and proxy raises its own
        return False
    return True


def fetching(source: str, revision: str | None) -> dict[str, object]:
    """Return keywords of ``from_pretrained``: none for a folder.

    For a hub name, they set the revision, and that only the cache is read if the hub cannot be
    reached.
    """
    if Path(source).is_dir():
        return {}
    return {"revision": revision, "local_files_only": not reachable()}


@contextmanager
def one_sentence(source: str, revision: str | None, key: str = "model.path") -> Iterator[None]:
    """Turn an error of loading into one sentence that says what to set instead.

    Args:
        source: folder or hub name that is loaded in the context.
        revision: the hub model's commit or tag, or null.
        key: the configuration key that takes a folder.

    Raises:
        ValueError: takes the place of every ValueError, and of every OSError, which hub clients and
            missing files raise.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise _in_one_sentence(source, revision, key, error) from error


def _in_one_sentence(source: str, revision: str | None, key: str, error: Exception) -> ValueError:
    said = f": {' '.join(str(error).split())}"  # perhaps with a part of a file that is no model's
    if Path(source).is_dir() or isinstance(error, ValueError):
        return PartlyPublic(f"{key}={source} cannot be loaded", said)
    named = source if revision is None else f"{source} (revision {revision[:7]})"
    give = f"give {key}=FOLDER"
    option = "" if revision is None else f" --revision {revision}"
    download = f"'hf download {source}{option} --local-dir FOLDER'"
    causes = list(_causes(error))
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return ValueError(
            f"model {named} is gated: accept its licence on its page of the hub and log in with "
            f"'hf auth login', or {give}"
        )
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return ValueError(
            f"model {source} has no revision {revision} on the hub: set model.revision"
        )
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):
        return ValueError(
            f"model {source} is neither a folder here{not_below(source)} nor a public model of the "
            f"hub: {give}"
        )
    if not reachable():
        return ValueError(
            f"model {named} is no folder here{not_below(source)} and not in the hub cache, and the "
            f"hub cannot be reached: download it where there is a network, with {download}, "
            f"and {give}"
        )
    return PartlyPublic(f"model {named} cannot be loaded", said)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def weights_sha256(source: str, revision: str | None = None) -> str | None:
    """Hash the safetensors files that transformers loads, in the order of their names.

    Args:
        source: a folder, or a hub name whose files are in the cache.
        revision: the hub model's commit or tag; null for its main branch.

    Returns:
        The hexadecimal SHA-256; null if no such files are on this machine.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(source, "config.json", revision=revision)
        except errors.HFValidationError:  # the path of a folder that is gone
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    files = _loaded(folder)
    return sha256_of(files) if files else None


def _loaded(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder that transformers loads, sorted."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        names = set(read_json(index)["weight_map"].values())
        return sorted(file for name in names if (file := folder / name).exists())
    return sorted(folder.glob("*.safetensors"))


def sha256_of(files: Iterable[Path]) -> str:
    """Hash files one after another, as if they were one."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
