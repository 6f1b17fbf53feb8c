"""An object store for tests, behind s3:// on a folder of this machine."""

import errno
import pathlib

import fsspec
import pytest
from etils import epath
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
    """Nothing can be renamed, and there are no folders to make; what is read, written and deleted is recorded."""

    protocol = "s3"
    cachable = False
    root = ""
    # Of all instances, since epath makes its own: paths in the order in which files were opened.
    read: list[str] = []  # noqa: RUF012
    written: list[str] = []  # noqa: RUF012
    deleted: list[str] = []  # noqa: RUF012
    refused = ""  # uploads whose path contains this fail

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        return cls.root + "/" + path.removeprefix("s3://") if path.startswith("s3://") else path

    def _open(self, path, mode="rb", **options):
        if mode == "wb":
            if self.refused and self.refused in path:
                raise PermissionError(errno.EACCES, "Permission denied")
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        (self.written if mode == "wb" else self.read).append(path)
        return super()._open(path, mode, **options)

    def rm(self, path, **options):
        self.deleted.append(str(path))
        super().rm(path, **options)

    rm_file = rm

    def mv(self, *arguments, **options):
        raise NotImplementedError("object stores copy")

    def mkdir(self, *arguments, **options):
        raise NotImplementedError("object stores have no folders")

    makedirs = mkdir


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder behind s3://bucket, which is empty; in this process."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
    backend = epath.backend.fsspec_backend
    type(backend)._get_filesystem.cache_clear()
    monkeypatch.setattr(Bucket, "root", str(tmp_path / "remote"))
    monkeypatch.setattr(Bucket, "refused", "")
    for kept in (Bucket.read, Bucket.written, Bucket.deleted):
        kept.clear()
    yield tmp_path / "remote" / "bucket"
    type(backend)._get_filesystem.cache_clear()
