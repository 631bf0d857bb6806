"""The shared floor: command line, batches, report blocks, exit codes."""

import utils

import numpy as np
import pytest

from read_MNIST_M import DataError, Split


def parser():
    return utils.argument_parser(
        "Test.",
        name="q1",
        data="x.npy",
        epochs=7,
        quick_epochs=3,
        batch_size=5,
        learning_rate=0.1,
        code_dim=4,
    )


def complete(*arguments):
    arguments = ["--data", "given.npy", *arguments]
    return utils.complete_options(parser().parse_args(arguments))


def test_quick_never_touches_the_report():
    full, quick = complete(), complete("--quick")
    assert (full.epochs, quick.epochs) == (7, 3)
    assert full.updates_report
    assert not quick.updates_report
    assert str(full.figures) == "figures"
    assert str(quick.figures) == "runs/quick/figures"
    assert str(quick.run_dir) == "runs/quick/q1"
    assert not complete("--figures", "elsewhere").updates_report


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--epochs", "x"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "inf"],
        ["--batch-size", "-1"],
        ["--no-such-flag"],
    ],
)
def test_wrong_argument_is_one_line_and_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert arguments[0] in error


def test_help_tells_each_default(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("x.npy", "default: 7", "default: 5", "0.1", "default: 4"):
        assert default in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("a\nb"), 2),
        (utils.UsageError("wrong"), 2),
        (OSError("disk full"), 2),
        (KeyboardInterrupt(), 130),
        (None, 0),
    ],
)
def test_exit_codes(capsys, error, code):
    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as stopped:
        utils.run_script(main)
    assert stopped.value.code == code
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0
    assert bool(told) == bool(error)


def epoch_orders(first_epoch, epochs, seed=3):
    images = np.arange(10, dtype=np.uint8)[:, np.newaxis]
    batches = utils.shuffled_batches(images, 4, seed, first_epoch)
    seen = [batch[:, 0] for batch in batches.take(2 * epochs).as_numpy_iterator()]
    return [np.concatenate(seen[i : i + 2]) for i in range(0, len(seen), 2)]


def test_epochs_have_orders_of_their_own_that_resuming_repeats():
    whole = epoch_orders(0, 4)
    assert all(len(set(order)) == 8 for order in whole)
    assert len({tuple(order) for order in whole}) == 4
    np.testing.assert_array_equal(whole[2:], epoch_orders(2, 2))
    assert not np.array_equal(whole, epoch_orders(0, 4, seed=4))


def test_splits_too_small_to_measure_are_refused():
    def split(count):
        return Split(np.zeros((count, 784), np.uint8), None)

    whole = [split(3000), split(300), split(600)]
    assert [len(s.images) for s in utils.limit_splits(whole, True)] == [2000, 200, 500]
    assert [len(s.images) for s in utils.limit_splits(whole, False)] == [3000, 300, 600]
    with pytest.raises(utils.UsageError, match="found 19 test images"):
        utils.limit_splits([*whole[:2], split(19)], False)


def test_report_blocks_are_rewritten_and_prose_is_kept(tmp_path):
    path = tmp_path / "report.md"
    prose = "before\n<!-- begin a -->\n{}\n<!-- end a -->\nafter \\1\n"
    path.write_text(prose.format("old"))
    utils.update_report({"a": "new \\1\n"}, path)
    assert path.read_text() == prose.format("new \\1")
    with pytest.raises(utils.UsageError, match="0 blocks b"):
        utils.update_report({"b": "new"}, path)
    assert path.read_text() == prose.format("new \\1")
