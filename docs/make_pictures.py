"""Makes the pictures of README.md and docs/ anew, and records in pictures.json what they were made by.

    python docs/make_pictures.py                              # trains `quickstart`, about three minutes on 2 cores
    python docs/make_pictures.py --celeba64=WORKDIR --celeba64_deep_faces=WORKDIR    # and those of runs of these

It needs `facevae-jax[dev]` and Chromium. tests/test_pictures.py compares pictures.json with the pictures and with the
code. No picture shows a photograph.
"""

import argparse
import ast
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from playwright import sync_api

DOCS = pathlib.Path(__file__).resolve().parent
RECORD = DOCS / "pictures.json"
# What decides what a picture looks like. Comments and docstrings do not.
COMMON = (
    "facevae_jax/models/*.py",
    "facevae_jax/latents/**/*.py",
    "facevae_jax/objective.py",
    "facevae_jax/generation/sheets.py",
    "facevae_jax/data/drawn/*.py",
)
EXPLORER = "facevae_jax/exploring/**/*"  # decides the explorer's picture too
EXPLORE = ["explore"]
MODELS = {"celeba64_deep_faces": "hierarchical.py"}  # the model's file, where it is not vae.py
PICTURES = {
    "quickstart_reconstructions.png": ("quickstart", ["generate", "reconstruct", "--count=24"]),
    "quickstart_samples.png": ("quickstart", ["generate", "sample", "--count=64"]),
    "explorer.png": ("quickstart", EXPLORE),
    "celeba64_samples.png": ("celeba64", ["generate", "sample", "--count=64"]),
    "celeba64_edits.png": (
        "celeba64",
        [
            *("generate", "edit", "--count=1", "--seed=3", "--temperature=0.7", "--alpha=-3,-2,-1,0,1,2,3"),
            "--attribute=Smiling,Male,Eyeglasses,Young,Blond_Hair",
        ],
    ),
    "celeba64_deep_faces_samples.png": ("celeba64_deep_faces", ["generate", "sample", "--count=64"]),
}
SEEN = "#from=7,flow,1&to=8,flow,1&morph=0.25&prior=flow&temperature=1&attribute:glasses=2&attribute:hair_length=1"
WINDOW = {"width": 1100, "height": 760}


def code_of(name: str) -> str:
    """A hash of the code that decides a picture, without Python's comments and docstrings."""
    root, found = DOCS.parent, hashlib.sha256()
    config, arguments = PICTURES[name]
    patterns = (*COMMON, f"configs/{config}.py", *([EXPLORER] if arguments == EXPLORE else []))
    paths = [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()]
    others = {"autoencoder.py", "hierarchical.py", "pca.py", "vae.py"} - {MODELS.get(config, "vae.py")}
    for path in (path for path in paths if path.name not in others and path.suffix != ".pyc"):
        if path.suffix != ".py":
            found.update(path.read_bytes())
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        found.update(f"{path.relative_to(root)} {_plain(tree)}\n".encode())
    return found.hexdigest()


def _plain(node: Any) -> str:
    """A syntax tree as text, the same for every version of Python: without fields that are empty, which some lack."""
    if isinstance(node, list):
        return f"[{', '.join(map(_plain, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{name}={_plain(value)}" for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({', '.join(fields)})"


def picture_hash(name: str) -> str:
    """Of a picture's file."""
    return hashlib.sha256((DOCS / name).read_bytes()).hexdigest()


def main() -> None:
    """Trains where no workdir is given, draws, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", help="a finished run of `quickstart`; trained anew by default")
    for config in ("celeba64", "celeba64_deep_faces"):
        parser.add_argument(f"--{config}", help=f"a finished run of `{config}`; its pictures are left without")
    given = vars(parser.parse_args())
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if not given["quickstart"]:
            given["quickstart"] = f"{folder}/quickstart"
            command("main", "--config=quickstart", f"--workdir={given['quickstart']}")
        for name, (config, arguments) in PICTURES.items():
            if given[config]:
                if arguments == EXPLORE:
                    photograph_the_explorer(given[config], DOCS / name)
                else:
                    command(*arguments, f"--workdir={given[config]}", f"--output={DOCS / name}")
                made_by = f"python -m facevae_jax.{' '.join(arguments)} --workdir={config}"
                record[name] = {"command": made_by, "code": code_of(name), "sha256": picture_hash(name)}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


def command(module: str, *arguments: str) -> None:
    """Runs one of the project's commands."""
    subprocess.run([sys.executable, "-m", f"facevae_jax.{module}", *arguments], cwd=DOCS.parent, check=True)


def photograph_the_explorer(workdir: str, path: pathlib.Path) -> None:
    """A picture of the explorer's page, as the address `SEEN` shows it."""
    words = [sys.executable, "-m", "facevae_jax.explore", f"--workdir={workdir}"]
    with subprocess.Popen(words, cwd=DOCS.parent, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        address = next(filter(None, (re.search(r"http://\S+", line) for line in server.stdout)))[0]
        try:
            with sync_api.sync_playwright() as started:
                browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                page = browser.new_page(viewport=WINDOW)
                page.goto(address + SEEN)
                page.wait_for_selector("body:not(:has([aria-busy])) #download[href]")
                page.screenshot(path=path)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
