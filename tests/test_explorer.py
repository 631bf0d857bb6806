"""The page of question 2's runs, in a real browser without a network."""

import json
import sys
from shutil import copytree, which

import utils

import keras
import numpy as np
import pytest

import q2_aae as q2
from extras import explorer, styles
from files import describe_source, write_json
from read_MNIST_M import load_digits

BROWSER = which("chromium") or which("chromium-browser") or which("google-chrome")
DIM, INFORMATIVE = 12, 4
SMALL = q2.DEFAULT._replace(hidden=(48, 48), informative=INFORMATIVE)
RNG = np.random.default_rng(0)
AS_JSON = "(_, value) => ArrayBuffer.isView(value) ? [...value] : value"
ALTERED = "CanvasRenderingContext2D.prototype.getImageData = "
ALTERED += "(x, y, width, height) => new ImageData(width, height)"  # all blank


def save_networks(folder, *networks, **record):
    path = folder / "networks.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    for network in networks:
        network.save(folder / f"{network.name}.keras")
        record[network.name] = utils.weights_digest(network)
    write_json(path, before | record)


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
    keras.utils.set_random_seed(0)
    kinds = {"q2": q2.AdversarialAutoencoder, "styles": styles.StyleAutoencoder}
    for name, kind in kinds.items():
        model = kind(DIM, SMALL)
        for network in (model.encoder, model.decoder):
            kernel = network.trainable_variables[-2]  # of the last layer
            kernel.assign(8 * kernel)  # else codes are all near zero, images all grey
        (folder / name).mkdir()
        save_networks(folder / name, data=describe_source(data)["sha256"])
        save_networks(folder / name, model.encoder, model.decoder)
    save_map(folder / "q2", RNG.normal(0, 9, (len(images), 2)).astype(np.float32))
    arguments = ["--data", data, "--run-dir", folder / "q2"]
    output = ["--styles-dir", folder / "styles", "--output", folder / "page.html"]
    write_page(*arguments, *output)
    return folder, arguments, images


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="there is no playwright")
    with api.sync_playwright() as playwright:
        options = {"executable_path": BROWSER, "args": ["--no-sandbox"]}
        launched = playwright.chromium.launch(timeout=120_000, **options)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser):
    """Return a function that opens a page offline; no word of it is let pass."""
    pages, words, local = [], [], ("file:", "data:", "blob:")

    def open_page(path, width=1200, script=""):
        options = {"offline": True, "reduced_motion": "reduce"}
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        pages.append(page)
        page.add_init_script(script)
        page.set_default_timeout(60_000)
        page.on("console", lambda message: words.append(message.text))
        page.on("pageerror", lambda error: words.append(str(error)))
        page.on("request", lambda request: words.append(request.url))
        page.goto(path.as_uri())
        page.evaluate("explorer.ready")
        assert page.locator("#notice").is_hidden(), page.inner_text("#notice")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [word for word in words if not word.startswith(local)] == []


@pytest.fixture
def page(made, opened):
    return opened(made[0] / "page.html")


def until(page, condition):
    """Wait for a condition; Playwright's own waiting needs eval, which is forbidden."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def array(page, expression):
    """Return an array of the page, as text, for Playwright is slow with numbers."""
    text = page.evaluate(f"JSON.stringify({expression}, {AS_JSON})")
    return np.array(json.loads(text))


def drawn(page, selector):
    canvases = f"[...document.querySelectorAll('{selector}')]"
    return array(page, f"{canvases}.flatMap((canvas) => canvas.images)")


def pixel(name):
    return f"document.getElementById('{name}').images[0][400]"


def assert_kerass(found, path, inputs):
    """Check what the page makes of inputs; of a code, the informative coordinates."""
    known = keras.saving.load_model(path).predict(inputs, verbose=0)[:, : len(found[0])]
    assert known.std() > 0.05  # else any network would pass
    assert np.abs(known - found).max() < 12 / 255


def test_a_stroke_is_centred_encoded_and_restored(made, page):
    page.locator("#pad").scroll_into_view_if_needed()
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    for x, y in ((120, 40), (180, 50), (150, 120), (110, 180)):
        page.mouse.move(box["x"] + x, box["y"] + y, steps=3)
    page.mouse.up()
    until(page, "explorer.pad.image !== null")
    image = drawn(page, "#drawn-input").reshape(28, 28)
    weights, places = image / image.sum(), np.arange(28)
    assert weights.sum(axis=1) @ places == pytest.approx(14, abs=0.1)
    assert weights.sum(axis=0) @ places == pytest.approx(14, abs=0.1)
    high, wide = ((image > 0.02).any(axis=axis).sum() for axis in (1, 0))
    assert 19 <= max(high, wide) <= 21 and ((image > 0.1) & (image < 0.9)).any()
    code = "explorer.complete('main', explorer.encode('main', explorer.pad.image))"
    code, run = array(page, code), made[0] / "q2"
    assert_kerass([code[:INFORMATIVE]], run / "encoder.keras", image.reshape(1, 784))
    restored = drawn(page, "#drawn-decoded")
    assert_kerass(restored, run / "decoder.keras", code[np.newaxis])
    others = drawn(page, "#drawn-draws canvas")
    assert len(others) == 6 and others.std(axis=0).max() > 1e-3
    page.click("#other-draws")
    until(page, f"{pixel('drawn-decoded')} !== {restored[0][400]}")
    assert "nearest training codes" in page.inner_text("#drawn-text")
    page.click("#pad-clear")
    until(page, "explorer.pad.image === null")


def test_a_style_is_read_and_written_as_keras_does(made, page):
    run = made[0] / "styles"

    def shown():
        """Check the ten digits and the sliders; return the code."""
        code, ten = array(page, "explorer.moved.styles"), drawn(page, "#styles-all *")
        assert ten.std(axis=0).max() > 0.05  # else any digit would pass
        assert_kerass(ten, run / "decoder.keras", [np.tile(code, (10, 1)), np.eye(10)])
        digit = int(page.input_value("#styles-class"))
        assert (drawn(page, "#styles-digit") == ten[digit]).all()
        sliders = page.locator("#sliders-styles input").all()
        places = [float(slider.input_value()) for slider in sliders]
        known = sorted(code[:INFORMATIVE].clip(-3, 3))
        assert sorted(places) == pytest.approx(known, abs=0.026)
        return code

    page.click("#styles-drawing")
    assert page.inner_text("#styles-text") == "Nothing is drawn yet."
    page.click("#pad-example")
    until(page, "explorer.pad.image !== null")
    known = {"drawing": drawn(page, "#drawn-input"), "training": made[2]}
    for source, images in known.items():
        page.click(f"#styles-{source}")
        image, code = drawn(page, "#styles-source"), shown()
        assert np.abs(images - image).max(axis=1).min() < 1e-6
        assert_kerass([code[:INFORMATIVE]], run / "encoder.keras", image)
    page.select_option("#styles-class", "7")
    assert (shown() == code).all()
    page.click("#styles-new")
    assert (shown() != code).all() and drawn(page, "#styles-source") == [None]


def test_a_seed_fixes_the_grid(made, page):
    def grid(seed):
        page.fill("#seed", str(seed))
        page.press("#seed", "Enter")
        page.locator(f"#prior[aria-label*='seed {seed},']").wait_for()
        return drawn(page, "#prior")

    first, other, again = grid(7), grid(8), grid(7)
    codes = array(page, f"explorer.draws(7, 40, {DIM})")
    assert abs(codes.mean()) < 0.15 and abs(codes.std() - 1) < 0.15
    assert_kerass(first, made[0] / "q2" / "decoder.keras", codes)
    assert (first == again).all() and np.abs(first - other).max() > 0.01


def test_every_control_is_reached_and_worked_by_keys(page):
    wanted = page.locator(":is(a, button, select, input, [tabindex]):visible").count()
    focus = "document.activeElement"
    outline = f"{focus}.dataset.outline = getComputedStyle({focus}).outlineStyle"
    for _ in range(wanted):
        page.keyboard.press("Tab")
        assert page.evaluate(outline) != "none"
    assert page.locator("[data-outline]").count() == wanted > 40

    for selector, key, state in (
        ("#map", "+", "explorer.view.zoom"),
        ("#map", "ArrowRight", "explorer.view.x"),
        ("#map", "Enter", "explorer.chosen.kept"),
        ("#position", "ArrowLeft", "explorer.walk.at"),
        ("#play", "Enter", "explorer.walk.playing"),
        ("#class-0", "ArrowDown", "explorer.walk.codes[0][0]"),
        ("#axis-main-0", "ArrowRight", pixel("axes-digit")),
        ("#axis-styles-0", "ArrowRight", pixel("styles-digit")),
        ("#styles-class", "ArrowDown", pixel("styles-digit")),
        ("#styles-new", "Enter", "explorer.moved.styles[0]"),
        ("#pad", "Space", "explorer.pad.strokes.length"),
        ("#pad", "ArrowDown", "explorer.pad.strokes[0].length"),
        ("#legend button", "Enter", "explorer.chosen.digit"),
    ):
        before = page.evaluate(state)
        page.locator(selector).first.focus()
        page.keyboard.press(key)
        until(page, f"{state} !== {json.dumps(before)}")


@pytest.mark.parametrize("width", [320, 1600])
def test_nothing_is_wider_than_the_window(made, opened, width):
    page = opened(made[0] / "page.html", width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_styles_a_sentence_stands(made, page, opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_page(*made[1])
    lone = opened(tmp_path / "figures" / "q2_explorer.html")
    assert "make styles" in lone.inner_text("#part-styles")
    assert lone.locator("#styles-present").is_hidden()
    assert page.locator("#styles-absent").is_hidden()
    for each, runs in ((lone, 1), (page, 2)):
        facts, count = each.inner_text("#facts"), len(made[2])
        assert facts.count(f"Over {count + 3000:,} codes decoded by the") == runs
        assert facts.count(f"over {count} encoded images") == runs


def test_a_browser_that_alters_pictures_is_told(made, opened):
    page = opened(made[0] / "page.html", script=ALTERED)
    page.click("#pad-example")
    until(page, "document.getElementById('drawn-text').textContent.includes('alters')")
    assert page.evaluate("explorer.pad.image") is None


def test_a_saved_page_works(page, opened, tmp_path):
    path = tmp_path / "saved.html"
    path.write_text(page.evaluate("document.documentElement.outerHTML"), "utf-8")
    saved = opened(path)
    controls = "button, option, input"
    assert saved.locator(controls).count() == page.locator(controls).count()
    saved.click("#pad-example")
    until(saved, "explorer.pad.image !== null")


def test_a_damaged_page_says_so(made, page, tmp_path):
    text, path = (made[0] / "page.html").read_text("utf-8"), tmp_path / "damaged.html"
    blob = text.split('id="blob-main-decoder">')[1].split("</script>")[0]
    part = blob[5000:5040]
    cuts = "header nav, main", ".page {", 'id="part-walk"', part, "function start"
    damaged = [text.split(cut)[0] for cut in cuts]
    damaged += [text.replace(part, other) for other in ("", "!", 40 * "A")]
    changes = {blob: blob[:5000], 'blob-meta">': 'blob-meta">H4', "blob-main-d": "d"}
    damaged += [text.replace(*change) for change in changes.items()]
    for content in damaged:
        path.write_text(content, "utf-8")
        page.goto(path.as_uri())
        page.evaluate("window.explorer?.ready")
        assert "incomplete or damaged" in page.inner_text("#notice")
        assert page.locator("canvas:visible").count() == 0


def spoil_decoder(folder, value):
    decoder = q2.build_decoder(DIM, SMALL)
    kernel = decoder.layers[2].kernel  # of the second hidden layer
    kernel.assign(np.where(np.eye(48), value, kernel))
    save_networks(folder, decoder)


@pytest.mark.parametrize(
    "name, spoil, told",
    [
        ("q2", lambda run: save_networks(run, decoder="0"), "found another network"),
        ("q2", lambda run: spoil_decoder(run, np.nan), "weights that are not finite"),
        ("q2", lambda run: spoil_decoder(run, 3e38), "outputs that are not finite"),
        ("q2", lambda run: spoil_decoder(run, 3e3), "rounding changes an output by"),
        ("q2", lambda run: (run / "tsne.npz").unlink(), "tsne.npz: found"),
        ("q2", lambda run: save_map(run, np.eye(2)), "points of shape (2, 2)"),
        ("q2", lambda run: save_map(run, np.full((420, 2), np.inf)), "not finite"),
        ("q2", lambda run: save_map(run, np.eye(2), encoder="0"), "another encoder"),
        ("styles", lambda run: save_networks(run, data="0"), "a run on other data"),
        ("styles", lambda run: (run / "decoder.keras").write_bytes(b"PK"), "keras: fo"),
        ("styles", lambda run: spoil_decoder(run, 0), "found No such layer: decoder"),
    ],
)
def test_misfits_are_refused(made, refused, tmp_path, monkeypatch, name, spoil, told):
    monkeypatch.chdir(tmp_path)
    copytree(made[0], "runs")
    spoil(tmp_path / "runs" / name)
    error = refused(explorer.main, *made[1][:2])
    assert told in error and ("-m extras.styles" in error) == (name == "styles")
    assert not (tmp_path / "figures").exists()


def test_a_wrong_path_is_told(made, refused):
    for option, value, told in (
        ("--styles-dir", "nosuch", "nosuch/networks.json: found"),
        ("--run-dir", "nosuch", "run python q2_aae.py"),
        ("--run-dir", made[0] / "styles", "an encoder and a decoder of shapes [("),
        ("--data", "", "--data: found an empty path"),
        ("--labels", "nosuch.npy", "nosuch.npy"),
    ):
        assert told in refused(explorer.main, *made[1], option, value)
