"""Files: replaced whole or not at all, JSON, and where data and numbers come from."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("tensorflow", "keras", "numpy", "scikit-learn", "openTSNE", "matplotlib")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; move it to `path` at the end.

    Where the block fails, the old file stays as it was. A symbolic link is kept, and
    the file that it points to is replaced; the file's mode is kept, too.

    Args:
        path: the file to write. Its folder is made where it is missing.

    Raises:
        OSError: the file can't be written; the error names it.
    """
    target = Path(os.path.realpath(path))
    # The suffix stays, for some libraries choose the format by it.
    temporary = target.with_name(f".{secrets.token_hex(4)}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        # A full disk's error names no file.
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write plain data as an indented JSON file."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is damaged; the error names the file.
        OSError: it can't be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: found no valid JSON ({error})") from None


def code_digest(sources: Iterable[str]) -> str:
    """Return the SHA-256 of Python sources, comments, layout and docstrings aside."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr(_skeleton(ast.parse(source))).encode())
    return digest.hexdigest()


def _skeleton(node: Any) -> Any:
    """Return a syntax tree as plain tuples, the same in every version of Python."""
    if isinstance(node, list):
        return [_skeleton(each) for each in node]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "docstring"
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _skeleton(value)) for name, value in ast.iter_fields(node)]
    # Versions differ in the fields that are empty.
    return type(node).__name__, [each for each in fields if each[1] not in ([], None)]


def sources_path(path: str | os.PathLike) -> Path:
    """Return the path of the record that `make_data.py` leaves beside a data file."""
    path = Path(path)
    return path.with_name(f"{path.stem}_sources.json")


def describe_source(path: str | os.PathLike) -> dict[str, str]:
    """Describe where a data file comes from.

    Returns:
        `file`, `sha256` and `source`. If `make_data.py` built the file and it has not
        changed since, also what its record says.
    """
    path = Path(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # A name of bytes that are no UTF-8 could not be written into a report.
    name = path.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    described = {"file": name, "sha256": digest, "source": "a file as given"}
    try:
        record = read_json(sources_path(path))
    except (OSError, ValueError):
        return described
    if isinstance(record, dict) and record.get("sha256") == digest:
        return described | record
    return described


def training_code(script: str) -> str:
    """Return a digest of the code that trains and measures a script's runs."""
    names = "read_MNIST_M.py", "utils.py", "metrics.py", Path(script).name
    paths = [Path(script).with_name(name) for name in names]
    return code_digest(path.read_text(encoding="utf-8") for path in paths)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # tensorflow-cpu, for example
            found[package] = version(package)
    return found
