"""Names of files and folders, and what files are in spite of their names.

A name is one thing wherever a split, a label or a layout is decided by it: see `canonical`.
"""

import contextlib
import pathlib
import re
import unicodedata

FFHQ_FOLDERS = ("thumbnails128x128", "images1024x1024")  # layouts know them by their names
CELEBA_FOLDERS = tuple(f"{top}img_align_celeba{kind}" for kind in ("", "_png") for top in ("", "Img/"))
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp")
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")  # with copies and thumbnails
PNG_START = b"\x89PNG\r\n\x1a\n"


def is_image(name: str) -> bool:
    """Whether a path is that of a PNG, JPEG or WebP file; hidden files, and files in hidden folders, are not."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".") and "/." not in name


def canonical(name: str) -> str:
    """A path as it is compared and hashed: forward slashes, composed Unicode (NFC), no byte order mark.

    Archives made on Windows have backslashes, and files copied from a Mac decomposed letters.
    """
    return unicodedata.normalize("NFC", name.replace("\\", "/")).replace("\ufeff", "")


def is_debris(name: str) -> bool:
    """Whether a file belongs to a desktop or a network drive, not to the images."""
    parts = name.split("/")
    of_system = not set(parts).isdisjoint(SYSTEM_FOLDERS)
    return of_system or parts[-1].startswith("._") or parts[-1] in (".DS_Store", "Thumbs.db", "desktop.ini")


def is_known_folder(name: str) -> bool:
    """Whether a layout knows a folder by its name, which so is no mere wrapping."""
    return name in (*FFHQ_FOLDERS, *CELEBA_FOLDERS)


# The first bytes of files that are often taken for .zip files, what they are, and what to do with them.
OTHER_FILES = (
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it with 7z x"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"\x1f\x8b", "a gzip file: unpack it with tar xzf or gunzip"),
    (b"BZh", "a bzip2 file: unpack it"),
    (b"\xfd7zXZ", "an xz file: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it"),
    (b"PAR1", "a Parquet file: give --layout=parquet"),
    (b"\xff\xd8\xff", "one JPEG image: give the folder that it is in"),
    (PNG_START, "one PNG image: give the folder that it is in"),
    (b"{", "a JSON file: give the folder of the images"),
    (b"<", "a page of a web site, perhaps about a quota: download the file itself"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with git lfs pull"),
)


def what_it_is(path: pathlib.Path) -> str:
    """What a file is that is no whole .zip file; empty where nobody knows."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(512)
        if re.search(r"\.7z\.\d+$", path.name, re.IGNORECASE):
            return "a part of a 7z archive: unpack the first part with 7z x"
        if start.startswith(b"PK\x03\x04") or re.search(r"\.(zip\.\d+|z\d\d)$", path.name, re.IGNORECASE):
            return "the end of the archive is missing: one part of several, or a download that broke off"
        if start[257:262] == b"ustar":
            return "a tar archive: unpack it with tar xf"
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        return next((what for magic, what in OTHER_FILES if text.startswith(magic)), "" if start else "it is empty")
    return ""
