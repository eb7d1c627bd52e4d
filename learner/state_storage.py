"""Where training states are kept: a folder that all nodes see, or a URI of PyArrow's file systems (s3://, gs://)."""

from __future__ import annotations

import os
from pathlib import Path

from pyarrow.fs import FileSystem, LocalFileSystem, copy_files

CHUNK_BYTES = 8 * 2**20


def storage_of(location: str) -> tuple[FileSystem, str]:
    """The file system of a location, and the path in it. Raises ValueError for a URI that PyArrow does not know."""
    if "://" in location:
        return FileSystem.from_uri(location)
    return LocalFileSystem(), os.path.abspath(location)


def put_files(folder: str | os.PathLike[str], location: str) -> None:
    """Copy all files of a folder on this node under a location, beside what is there."""
    storage, path = storage_of(location)
    storage.create_dir(path, recursive=True)
    copy_files(
        os.fspath(folder), path, source_filesystem=LocalFileSystem(), destination_filesystem=storage,
        chunk_size=CHUNK_BYTES,
    )  # fmt: skip


def fetch_files(location: str, folder: str | os.PathLike[str]) -> None:
    """Copy all files under a location into a folder on this node."""
    storage, path = storage_of(location)
    Path(folder).mkdir(parents=True, exist_ok=True)
    copy_files(
        path, os.fspath(folder), source_filesystem=storage, destination_filesystem=LocalFileSystem(),
        chunk_size=CHUNK_BYTES,
    )  # fmt: skip
