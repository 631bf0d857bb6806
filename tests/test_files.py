"""Files are replaced whole or not at all; JSON; where a data file comes from."""

import pytest
from conftest import contents, disk_with_room_for

import files


def test_replacing_leaves_the_old_file_whole_where_it_fails(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.replacing(path) as temporary:
        assert temporary.suffix == path.suffix
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    with (
        disk_with_room_for(2),
        pytest.raises(OSError, match="File too large: .*file.txt"),
        files.replacing(str(path)) as temporary,
    ):
        temporary.write_text("new")
    assert contents(tmp_path) == {path: b"old"}
    with files.replacing(path) as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {path: b"new"}


def test_replacing_writes_through_a_link_and_keeps_the_mode(tmp_path):
    file, link = tmp_path / "file.txt", tmp_path / "elsewhere" / "link.txt"
    file.write_text("old")
    file.chmod(0o640)
    link.parent.mkdir()
    link.symlink_to("../file.txt")
    with files.replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o640


def test_json_is_read_as_written_and_damage_names_the_file(tmp_path):
    path, content = tmp_path / "numbers.json", {"mse": 0.5, "none": None}
    files.write_json(path, content)
    assert files.read_json(path) == content
    for damaged in (b'{"mse": 0.', b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="numbers.json: found no valid JSON"):
            files.read_json(path)


def test_source_of_a_built_file_is_known_until_somebody_changes_it(tmp_path):
    path = tmp_path / "data.npy"
    path.write_bytes(b"built")
    given = files.describe_source(path)
    assert given["file"] == "data.npy"
    assert given["source"] == "a file as given"
    record = {"source": "built", "digits": "MNIST", "sha256": given["sha256"]}
    files.write_json(files.sources_path(path), record)
    assert files.describe_source(path) == {"file": "data.npy"} | record
    for damaged in (b"{", b"[]"):
        files.sources_path(path).write_bytes(damaged)
        assert files.describe_source(path) == given
    files.write_json(files.sources_path(path), record)
    path.write_bytes(b"changed")
    assert files.describe_source(path)["source"] == "a file as given"


def test_code_is_told_apart_by_what_it_does():
    def digest(code):
        return files.code_digest([code])

    code = 'def f(x):\n    """Add one."""\n    return x + 1\n'
    reworded = '# Changed.\ndef f(x):\n    """Increase."""\n\n    return (x +\n 1)'
    assert digest(code) == digest(reworded)
    assert digest(code) != digest(code.replace("1", "2"))
    assert digest("x = 'a'") != digest("x = 'b'")  # a text, but no docstring


def test_training_code_is_of_the_script_and_of_the_floor(tmp_path):
    for name in ("read_MNIST_M.py", "utils.py", "metrics.py", "plots.py", "q.py"):
        (tmp_path / name).write_text("x = 1")
    script = tmp_path / "q.py"
    before = files.training_code(str(script))
    (tmp_path / "plots.py").write_text("x = 2")
    assert files.training_code(str(script)) == before
    for name in ("metrics.py", "q.py"):
        (tmp_path / name).write_text("x = 2")
        assert files.training_code(str(script)) != before
        (tmp_path / name).write_text("x = 1")
