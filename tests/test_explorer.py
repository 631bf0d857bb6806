"""The page of question 2's runs, in a real browser without a network."""

import json
import shutil
import sys

import utils

import keras
import numpy as np
import pytest

import metrics
import q2_aae as q2
from extras import explorer
from read_MNIST_M import load_digits

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
DIM = 12
RNG = np.random.default_rng(0)
DECODE = "([run, codes]) => codes.map((code) => [...explorer.decode(run, code)])"
AXES_DIGIT = "document.getElementById('axes-digit')"
ENCODE = "(image) => explorer.encode(image)"
IMAGES = "(id) => document.getElementById(id).images.map((image) => [...image])"


def save_run(folder, **changes):
    keras.utils.set_random_seed(0)
    recipe = q2.DEFAULT._replace(hidden=(48, 48, 48), signal_dimensions=4, **changes)
    encoder, decoder = q2.build_encoder(DIM, recipe), q2.build_decoder(DIM, recipe)
    # Untrained, codes are all noise, and images all grey.
    means, pixels = encoder.get_layer("mean").kernel, decoder.layers[-1].kernel
    means.assign(means * np.where(np.arange(DIM) < 4, 20, 1))
    pixels.assign(8 * pixels)
    folder.mkdir()
    for network in (encoder, decoder):
        network.save(folder / f"{network.name}.keras")


def write_page(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["explorer.py", *map(str, arguments)])
        explorer.main()


@pytest.fixture(scope="module")
def made(tiny_data, tmp_path_factory):
    """A folder with two untrained runs and their page."""
    folder = tmp_path_factory.mktemp("explorer")
    images = utils.unit_floats(load_digits(tiny_data / "data.npy")[0].images)
    save_run(folder / "q2")
    save_run(folder / "q2_control", gaussian=False, decoder_skips=False)
    points = RNG.normal(0, 9, (len(images), 2)).astype(np.float32)
    np.savez(folder / "q2" / "tsne.npz", points=points)
    arguments = ["--run-dir", folder / "q2", "--control-dir", folder / "q2_control"]
    arguments += ["--data", tiny_data / "data.npy", "--output", folder / "page.html"]
    write_page(*arguments)
    return folder, arguments, images


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    reason = "there is no playwright: pip install playwright"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    with api.sync_playwright() as playwright:
        options = {"executable_path": BROWSER, "args": ["--no-sandbox"]}
        launched = playwright.chromium.launch(timeout=120_000, **options)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser):
    """Return a function that opens a page offline; no word of it is let pass."""
    contexts, words = [], []

    def requested(request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            words.append(request.url)

    def open_page(path, width=1200):
        size = {"width": width, "height": 900}
        options = {"viewport": size, "offline": True, "reduced_motion": "reduce"}
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: words.append(message.text))
        page.on("pageerror", lambda error: words.append(str(error)))
        page.on("request", requested)
        page.goto(path.as_uri())
        page.evaluate("explorer.ready")
        assert page.locator("#warning").is_hidden(), page.inner_text("#warning")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert words == []


def until(page, condition):
    """Wait for a condition; Playwright's own waiting needs eval, which is forbidden."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def ink(page, name):
    return np.array(page.evaluate(IMAGES, name))


def test_networks_are_kerass(made, opened):
    folder, _, images = made
    page = opened(folder / "page.html")
    codes = RNG.standard_normal((20, DIM)).astype(np.float32)
    for run, name in (("main", "q2"), ("control", "q2_control")):
        decoder = keras.saving.load_model(folder / name / "decoder.keras")
        known = decoder.predict(codes, verbose=0)
        assert known.std() > 0.05  # else any decoder would pass
        found = page.evaluate(DECODE, [run, codes.tolist()])
        assert np.abs(known - found).max() < 2 / 255
    encoder = keras.saving.load_model(folder / "q2" / "encoder.keras")
    means, deviations = metrics.posterior(encoder, images[:5])
    for image, mean, deviation in zip(images, means, deviations, strict=False):
        found = page.evaluate(ENCODE, image.tolist())
        assert found["mean"] == pytest.approx(mean, abs=0.11)
        spread = 2 * np.log(deviation)
        assert found["log_variance"] == pytest.approx(spread, abs=0.11)


def test_a_stroke_is_centred_encoded_and_restored(made, opened):
    page = opened(made[0] / "page.html")
    page.locator("#pad").scroll_into_view_if_needed()
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    for x, y in ((120, 40), (180, 50), (150, 120), (110, 180)):
        page.mouse.move(box["x"] + x, box["y"] + y, steps=3)
    page.mouse.up()
    until(page, "explorer.pad.image !== null")
    image = ink(page, "drawn-input")[0].reshape(28, 28)
    weights, places = image / image.sum(), np.arange(28)
    assert weights.sum(axis=1) @ places == pytest.approx(14, abs=0.1)
    assert weights.sum(axis=0) @ places == pytest.approx(14, abs=0.1)
    high, wide = ((image > 0.02).any(axis=axis).sum() for axis in (1, 0))
    assert 19 <= max(high, wide) <= 21 and ((image > 0.1) & (image < 0.9)).any()
    restored = "explorer.decode('main', explorer.encode(explorer.pad.image).mean)"
    known = page.evaluate(f"[...{restored}]")
    assert ink(page, "drawn-mean")[0] == pytest.approx(known)
    cells = "[...document.querySelectorAll('#drawn-draws canvas')]"
    drawn = np.array(page.evaluate(f"{cells}.map((each) => [...each.images[0]])"))
    assert len(drawn) == 6 and drawn.std(axis=0).max() > 1e-3
    assert "nearest training codes" in page.inner_text("#drawn-text")
    page.click("#pad-clear")
    until(page, "explorer.pad.image === null")


def test_a_seed_fixes_the_grid_of_both_runs(made, opened):
    page = opened(made[0] / "page.html")

    def grid(seed):
        page.fill("#seed", str(seed))
        page.press("#seed", "Enter")
        for run in ("main", "control"):
            text = f"document.getElementById('prior-{run}').ariaLabel"
            until(page, f"{text}.includes('seed {seed},')")
        return ink(page, "prior-main"), ink(page, "prior-control")

    first, other, again = grid(7), grid(8), grid(7)
    draws = f"explorer.draws(7, 40, {DIM}).map((code) => [...code])"
    codes = page.evaluate(draws)
    assert abs(np.mean(codes)) < 0.15 and abs(np.std(codes) - 1) < 0.15
    runs = "main", "control"
    for one, two, three, run in zip(first, other, again, runs, strict=True):
        assert (one == three).all() and np.abs(one - two).max() > 0.01
        assert one == pytest.approx(np.array(page.evaluate(DECODE, [run, codes])))


def test_every_control_is_reached_and_worked_by_keys(made, opened):
    page = opened(made[0] / "page.html")
    wanted = page.evaluate(
        "[...document.querySelectorAll('a, button, select, input, [tabindex]')]"
        ".filter((e) => e.offsetParent && (e.type !== 'radio' || e.checked)).length"
    )
    found = set()
    for number in range(wanted):
        page.keyboard.press("Tab")
        focus = "(document.activeElement.dataset.n ??= n, "
        focus += "getComputedStyle(document.activeElement).outlineStyle)"
        assert page.evaluate(f"(n) => {focus}", number) != "none"
        found.add(page.evaluate("document.activeElement.dataset.n"))
    assert len(found) == wanted > 40

    for selector, key, state in (
        ("#map", "+", "explorer.view.zoom"),
        ("#map", "ArrowRight", "explorer.view.x"),
        ("#map", "Enter", "explorer.chosen.kept"),
        ("#position", "ArrowLeft", "explorer.walk.at"),
        ("#play", "Enter", "explorer.walk.playing"),
        ("#class-0", "ArrowDown", "explorer.walk.ends[0]"),
        ("#axis-0", "ArrowRight", f"{AXES_DIGIT}.images[0][400]"),
        ("#runs input", "ArrowDown", "document.querySelector('#runs input').checked"),
        ("#pad", "Space", "explorer.pad.strokes.length"),
        ("#pad", "ArrowDown", "explorer.pad.strokes[0].length"),
        ("#legend button", "Enter", "explorer.chosen.digit"),
    ):
        before = page.evaluate(state)
        page.locator(selector).first.focus()
        page.keyboard.press(key)
        until(page, f"{state} !== {json.dumps(before)}")


@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_window(made, opened, width):
    page = opened(made[0] / "page.html", width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_a_control_its_parts_are_gone(made, opened):
    folder, arguments, _ = made
    path = folder / "alone.html"
    write_page(*arguments, "--control-dir", folder / "none", "--output", path)
    page = opened(path)
    assert page.locator("#prior-main").is_visible()
    assert page.locator("#prior-control").is_hidden()


def test_a_missing_map_is_told_in_one_line(made, refused):
    _, arguments, _ = made
    error = refused(explorer.main, *arguments, "--run-dir", made[0] / "q2_control")
    assert "tsne.npz" in error and "run python q2_aae.py first" in error
