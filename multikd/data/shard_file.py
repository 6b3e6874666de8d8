"""One shard while it is being written, and what a sample looks like in it."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from pathlib import Path

from multikd.data.index import build_index, index_path, without_mtime
from multikd.data.manifest import ShardRecord, Skipped
from multikd.data.tar import BLOCK
from multikd.files import TEMPORARY_SUFFIX, write_atomically


class OpenShard:
    """A shard while it is written, under a temporary name."""

    def __init__(self, folder: Path, number: int, start: int) -> None:
        self.path = folder / f"shard-{number:06d}.tar"
        self.start = start
        self.samples = 0
        self.size = 0
        self.skipped: list[Skipped] = []
        self._temporary = self.path.with_name(self.path.name + TEMPORARY_SUFFIX)
        self._file = self._temporary.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, members: list[tuple[str, bytes]], size: int) -> None:
        """Append a sample, which takes ``size`` bytes of the tar."""
        for name, data in members:
            info = tarfile.TarInfo(name)  # its defaults hold no time and no owner
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1
        self.size += size

    def finish(self, stop: int) -> ShardRecord:
        """Rename into place, index, and say what is in it."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        # Bound to the size only, so that copies of the shard can take the index along.
        index = without_mtime(build_index(self.path))
        write_atomically(index_path(self.path), index.to_bytes())
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = self.path.stat().st_size
        return ShardRecord(
            self.path.name, self.samples, size, self.start, stop, self.skipped, digest
        )

    def discard(self) -> None:
        """Delete what was not finished; does nothing afterwards or twice."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def sample_members(
    item: int, name: str, label: int, data: bytes, extension: str
) -> list[tuple[str, bytes]]:
    """A sample's members. Its key is the item's number, and as much of its name as is safe."""
    stem = os.path.basename(name).partition(".")[0]
    words = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")[:40]
    key = f"{item:09d}" + (f"-{words}" if words and words != str(item) else "")
    members = [(f"{key}.{extension}", data)]
    return members if label < 0 else [*members, (f"{key}.cls", str(label).encode())]


def bytes_in_tar(members: list[tuple[str, bytes]]) -> int:
    """What a sample takes of a tar: headers, and data padded to blocks."""
    return sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for _, data in members)
