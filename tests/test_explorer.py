"""The page of question 2's runs, in a real browser without a network."""

import json
import shutil
import sys

import utils

import keras
import numpy as np
import pytest

import q2_aae as q2
from extras import explorer
from files import describe_source, write_json
from read_MNIST_M import load_digits

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
DIM, INFORMATIVE = 12, 4
RNG = np.random.default_rng(0)
AS_JSON = "(_, value) => ArrayBuffer.isView(value) ? [...value] : value"
NOISY_CANVAS = """
CanvasRenderingContext2D.prototype.getImageData = (x, y, width, height) => {
  const picture = new ImageData(width, height);
  picture.data.forEach((_, i, data) => { data[i] = Math.random() * 256; });
  return picture;
};"""


def save_networks(folder, *networks, **record):
    """Save networks of a run, and enter them in its record."""
    path = folder / "networks.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    for network in networks:
        network.save(folder / f"{network.name}.keras")
        record[network.name] = utils.weights_digest(network)
    write_json(path, before | record)


def save_run(folder, data, **changes):
    keras.utils.set_random_seed(0)
    recipe = q2.DEFAULT._replace(hidden=(48, 48), **changes)
    encoder, decoder = q2.build_encoder(DIM, recipe), q2.build_decoder(DIM, recipe)
    # Untrained, codes are all near zero, and images are all grey.
    for layer in (encoder.get_layer("informative"), decoder.layers[-1]):
        layer.kernel.assign(8 * layer.kernel)
    folder.mkdir()
    save_networks(folder, encoder, decoder, data=describe_source(data)["sha256"])


def save_map(folder, points, **changes):
    encoder = json.loads((folder / "networks.json").read_text())["encoder"]
    np.savez(folder / "tsne.npz", **{"points": points, "encoder": encoder} | changes)


def write_page(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["explorer.py", *map(str, arguments)])
        explorer.main()


@pytest.fixture(scope="module")
def made(tiny_data, tmp_path_factory):
    """A folder with two untrained runs and their page."""
    folder, data = tmp_path_factory.mktemp("explorer"), tiny_data / "data.npy"
    images = utils.unit_floats(load_digits(data)[0].images)
    save_run(folder / "q2", data, informative=INFORMATIVE)
    save_run(folder / "q2_control", data, informative=None, decoder_skips=False)
    save_map(folder / "q2", RNG.normal(0, 9, (len(images), 2)).astype(np.float32))
    arguments = ["--data", data, "--run-dir", folder / "q2"]
    control = ["--control-dir", folder / "q2_control"]
    write_page(*arguments, *control, "--output", folder / "page.html")
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

    def open_page(path, width=1200, script=""):
        size = {"width": width, "height": 900}
        options = {"viewport": size, "offline": True, "reduced_motion": "reduce"}
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.add_init_script(script)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: words.append(message.text))
        page.on("pageerror", lambda error: words.append(str(error)))
        page.on("request", requested)
        page.goto(path.as_uri())
        page.evaluate("explorer.ready")
        assert page.locator("#notice").is_hidden(), page.inner_text("#notice")
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


def array(page, expression):
    """Return an array of the page, as text, for Playwright is slow with numbers."""
    return np.array(
        json.loads(page.evaluate(f"JSON.stringify({expression}, {AS_JSON})"))
    )


def drawn(page, name):
    return array(page, f"document.getElementById('{name}').images")


def decoded(page, run, codes):
    return array(page, f"{codes}.map((code) => explorer.decode('{run}', code))")


def test_networks_are_kerass(made, opened):
    folder, _, images = made
    page = opened(folder / "page.html")
    codes = RNG.standard_normal((20, DIM)).astype(np.float32)
    for run, name in (("main", "q2"), ("control", "q2_control")):
        decoder = keras.saving.load_model(folder / name / "decoder.keras")
        known = decoder.predict(codes, verbose=0)
        assert known.std() > 0.05  # else any decoder would pass
        difference = np.abs(known - decoded(page, run, codes.tolist()))
        assert difference.mean(axis=1).max() < 3 / 255
        assert difference.max() < 12 / 255
    encoder = keras.saving.load_model(folder / "q2" / "encoder.keras")
    known = encoder.predict(images[:5], verbose=0)[:, :INFORMATIVE]
    assert known.std() > 0.5
    found = array(page, f"{images[:5].tolist()}.map((image) => explorer.encode(image))")
    assert found == pytest.approx(known, abs=0.1)
    completed = "explorer.complete('main', [1, 2, 3, 4])"
    code = array(page, completed)
    assert len(code) == DIM and (code[:INFORMATIVE] == [1, 2, 3, 4]).all()
    assert (array(page, completed) == code).all()  # so that no picture flickers
    facts = page.inner_text("#facts")
    assert f"Over {len(images) + 3000:,} codes decoded by the main run" in facts
    assert f"Over {len(images)} encoded images" in facts


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
    image = drawn(page, "drawn-input").reshape(28, 28)
    weights, places = image / image.sum(), np.arange(28)
    assert weights.sum(axis=1) @ places == pytest.approx(14, abs=0.1)
    assert weights.sum(axis=0) @ places == pytest.approx(14, abs=0.1)
    high, wide = ((image > 0.02).any(axis=axis).sum() for axis in (1, 0))
    assert 19 <= max(high, wide) <= 21 and ((image > 0.1) & (image < 0.9)).any()
    code = "explorer.complete('main', explorer.encode(explorer.pad.image))"
    known = array(page, f"explorer.decode('main', {code})")
    assert drawn(page, "drawn-decoded")[0] == pytest.approx(known)
    cells = "[...document.querySelectorAll('#drawn-draws canvas')]"
    others = array(page, f"{cells}.map((each) => each.images[0])")
    assert len(others) == 6 and others.std(axis=0).max() > 1e-3
    page.click("#other-draws")
    pixel = "document.getElementById('drawn-decoded').images[0][400]"
    until(page, f"{pixel} !== {known[400]}")
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
        return drawn(page, "prior-main"), drawn(page, "prior-control")

    first, other, again = grid(7), grid(8), grid(7)
    codes = array(page, f"explorer.draws(7, 40, {DIM})")
    assert abs(codes.mean()) < 0.15 and abs(codes.std() - 1) < 0.15
    for number, run in enumerate(("main", "control")):
        assert (first[number] == again[number]).all()
        assert np.abs(first[number] - other[number]).max() > 0.01
        known = decoded(page, run, codes.tolist())
        assert first[number] == pytest.approx(known)


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
        ("#axis-0", "ArrowRight", "document.querySelector('#axes-digit').images[0][9]"),
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


def test_an_absent_control_leaves_no_empty_parts(made, opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_page(*made[1])
    page = opened(tmp_path / "figures" / "q2_explorer.html")
    assert page.locator("#prior-main").is_visible()
    assert page.locator("#prior-control").is_hidden()


def test_a_browser_that_alters_pictures_is_told(made, opened):
    page = opened(made[0] / "page.html", script=NOISY_CANVAS)
    page.click("#pad-example")
    until(page, "document.getElementById('drawn-text').textContent.includes('alters')")
    assert page.evaluate("explorer.pad.image") is None


def test_a_saved_page_works(made, opened, tmp_path):
    page = opened(made[0] / "page.html")
    path = tmp_path / "saved.html"
    path.write_text(page.evaluate("document.documentElement.outerHTML"), "utf-8")
    saved = opened(path)
    controls = "button, option, input"
    assert saved.locator(controls).count() == page.locator(controls).count()
    saved.click("#pad-example")
    until(saved, "explorer.pad.image !== null")


def test_a_damaged_page_says_so(made, opened, tmp_path):
    page = opened(made[0] / "page.html")
    text, path = (made[0] / "page.html").read_text("utf-8"), tmp_path / "damaged.html"
    blob = text.split('id="blob-main-decoder">')[1].split("</script>")[0]
    part = blob[5000:5040]
    cuts = "header nav, main", ".page {", 'id="part-walk"', part, "function start"
    damaged = [text.split(cut)[0] for cut in cuts]
    damaged += [text.replace(part, other) for other in ("", "!", 40 * "A")]
    damaged.append(text.replace(blob, blob[:5000]))
    damaged.append(text.replace("blob-main-decoder", "other"))
    damaged.append(text.replace('"blob-meta">', '"blob-meta">H4sI'))
    for content in damaged:
        path.write_text(content, "utf-8")
        page.goto(path.as_uri())
        page.evaluate("window.explorer?.ready")
        assert "incomplete or damaged" in page.inner_text("#notice")
        assert page.locator("canvas:visible").count() == 0


def spoil_decoder(folder, value, code_dim=DIM):
    decoder = q2.build_decoder(code_dim, q2.DEFAULT._replace(hidden=(48, 48)))
    kernel = decoder.layers[2].kernel  # of the second hidden layer
    kernel.assign(np.where(np.eye(48), value, kernel))
    save_networks(folder, decoder)


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda run: (run / "networks.json").unlink(), "networks.json: found"),
        (lambda run: (run / "networks.json").write_text("{"), "networks.json: found"),
        (lambda run: save_networks(run, data="0"), "a run on other data"),
        (lambda run: save_networks(run, decoder="0"), "decoder.keras: found another"),
        (lambda run: (run / "decoder.keras").write_bytes(b"PK"), "decoder.keras: fou"),
        (lambda run: spoil_decoder(run, np.nan), "weights that are not finite"),
        (lambda run: spoil_decoder(run, 3e38), "outputs that are not finite"),
        (lambda run: spoil_decoder(run, 3e3), "rounding changes an output by"),
        (lambda run: spoil_decoder(run, 0, code_dim=9), "of shapes [("),
        (lambda run: (run / "tsne.npz").unlink(), "tsne.npz: found"),
        (lambda run: save_map(run, np.eye(2)), "points of shape (2, 2)"),
        (lambda run: save_map(run, np.full((420, 2), np.inf)), "not finite"),
        (lambda run: save_map(run, np.eye(2), encoder="0"), "another encoder's codes"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    made, refused, tmp_path, monkeypatch, spoil, told
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made[0] / "q2", "runs/q2")
    spoil(tmp_path / "runs/q2")
    assert told in refused(explorer.main, *made[1][:2])
    assert not (tmp_path / "figures").exists()


def test_a_wrong_path_is_told(made, refused):
    for option, value, told in (
        ("--control-dir", "nosuch", "nosuch/networks.json: found"),
        ("--run-dir", "nosuch", "run python q2_aae.py"),
        ("--data", "", "--data: found an empty path"),
        ("--labels", "nosuch.npy", "nosuch.npy"),
    ):
        assert told in refused(explorer.main, *made[1], option, value)
