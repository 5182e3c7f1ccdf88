"""The Hugging Face Hub: which commit a revision is at the moment."""

from __future__ import annotations


def pinned(source: str) -> str:
    """hf://org/name[@revision][/folder] with the commit in place of the revision, so that all files are of one commit.

    Raises what huggingface_hub raises; FileNotFoundError for a repository or revision that is not there.
    """
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

    resolved = HfFileSystem(skip_instance_cache=True).resolve_path(source)
    if not isinstance(resolved, HfFileSystemResolvedRepositoryPath):
        raise FileNotFoundError("a bucket of the Hub, expected a repository")
    commit = HfApi().repo_info(resolved.repo_id, revision=resolved.revision, repo_type=resolved.repo_type).sha
    folder = f"/{resolved.path_in_repo}" if resolved.path_in_repo else ""
    kind = "" if resolved.repo_type == "model" else f"{resolved.repo_type}s/"
    return f"hf://{kind}{resolved.repo_id}@{commit}{folder}"
