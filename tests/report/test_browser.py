"""The page as a browser shows it: what it says, on a screen and on a phone; and that hostile text stays text."""

import contextlib
import os

import pytest
import story

from kithara_ray.report import page

SCREENS = [(1200, 900, "light"), (1200, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]


@contextlib.contextmanager
def opened(browser, html, tmp_path, size=(1200, 900), colours="light"):
    """The page, what it asked of the network, and what its console said."""
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    tab = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=colours)
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(path.as_uri())
    yield tab, asked, said
    tab.close()


@pytest.mark.parametrize(("width", "height", "colours"), SCREENS)
def test_what_it_shows(browser, tmp_path, width, height, colours):
    """KITHARA_RAY_SCREENSHOTS=DIR keeps the pictures."""
    html = page.render(story.run_json(plan=story.PLAN), story.history())
    with opened(browser, html, tmp_path, (width, height), colours) as (tab, asked, said):
        assert said == []
        assert asked == [(tmp_path / "report.html").as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        text = tab.inner_text("main")
        for expected in (
            "gemma-2-2b-alpaca",
            "finished",
            "0.8131",
            "from 2.359",
            "best 1.001 at step 1200",
            "31.0%",
            "8.94 GiB",
            "0.12% of 2.618B",
            "Paris.",
            "compile",
            "48 s",
            "18 / 96 / 311 / 1024",
            "untouched tensors equal the base's bit by bit",
            "8.58 GiB",
        ):
            assert expected in text, expected
        for chart in ("loss", "rate", "tokens", "time", "norm", "mfu"):
            box = tab.locator(f"#chart-{chart} .plot").bounding_box()
            lines = tab.locator(f"#chart-{chart} path.line")
            for number in range(lines.count()):
                line = lines.nth(number).bounding_box()
                # As wide as the plot, and nowhere out of it.
                assert line["width"] == pytest.approx(box["width"], rel=0.1), chart
                assert box["y"] - 2 <= line["y"], chart
                assert line["y"] + line["height"] <= box["y"] + box["height"] + 2, chart
        # Nothing lies over a neighbour.
        assert tab.evaluate(OVERLAPS) == []
        if directory := os.environ.get("KITHARA_RAY_SCREENSHOTS"):
            tab.screenshot(path=f"{directory}/report-{width}-{colours}.png", full_page=True)


# Pairs of texts whose boxes cross, of all that have text of their own.
OVERLAPS = """() => {
  const texts = [...document.querySelectorAll("main *")].filter((element) =>
    [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
    && element.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true})
    && getComputedStyle(element).display !== "inline");
  const boxes = texts.map((element) => [element, element.getBoundingClientRect()]).filter(([, box]) => box.width);
  const crossing = [];
  boxes.forEach(([one, a], index) => boxes.slice(index + 1).forEach(([other, b]) => {
    if (one.contains(other) || other.contains(one)) return;
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 1) crossing.push([one.textContent.slice(0, 30), other.textContent.slice(0, 30)]);
  }));
  return crossing;
}"""


def test_the_figures_under_the_pointer(browser, tmp_path):
    html = page.render(story.run_json(), story.history(8))
    with opened(browser, html, tmp_path) as (tab, _, said):
        plot = tab.locator("#chart-loss .plot")
        box = plot.bounding_box()
        tab.mouse.move(box["x"] + box["width"] * 2 / 7 + 3, box["y"] + 40)
        third = story.steps(8)[2]["loss"]
        assert tab.locator("#chart-loss .tip").inner_text() == f"step 3\ntraining {third:.5g}"
        plot.focus()
        tab.keyboard.press("ArrowRight")
        assert tab.locator("#chart-loss .tip").inner_text().startswith("step 4\n")
        tab.mouse.move(5, 5)
        assert not tab.locator("#chart-loss .tip").is_visible()
        assert said == []


def test_hostile_text_stays_text(browser, tmp_path):
    """Wherever text of others goes in: names, rows, prompts, answers, errors, paths."""
    evil = story.HOSTILE
    run = story.run_json("failed", error=f"TrainingError: {evil}", git={"revision": evil}, versions={evil: evil})
    run["settings"]["run_config"]["name"] = evil
    run["settings"]["model"]["preset_handle"] = "</pre>" + evil
    run["environment"] = {evil: evil}
    run["data"] = {evil: {"rows": evil, "tokens": 3, "trained_tokens": 1, "fingerprint": "'\"" + evil}}
    samples = [{"prompt": evil, "before": "</script>" + evil, "after": "<!--" + evil}]
    more = [
        {"kind": "skipped", "step": 3, "rows": [evil]},
        {"kind": "dropped", "text": evil},
        {"kind": "export", "step": 3, "path": evil, "error": evil},
    ]
    exports = [{"path": "javascript:alert(1)" + evil, "layout": evil, "checks": [evil], "notes": [evil]}]
    history = story.history(5)
    html = page.render(run, {"events": history["events"] + more, "samples": samples, "exports": exports})
    with opened(browser, html, tmp_path) as (tab, asked, said):
        assert tab.title() == f"{evil}: failed"
        assert tab.evaluate("document.images.length + document.querySelectorAll('main script, a, iframe').length") == 0
        assert tab.inner_text("#error pre") == f"TrainingError: {evil}"
        assert tab.text_content("#configuration pre").count("onerror") >= 2
        assert (said, len(asked)) == ([], 1)


def test_the_policy_lets_no_other_script_run(browser, tmp_path):
    """Were something ever not escaped."""
    html = page.render(story.run_json(), story.history(5)).replace("<main>", f"<main>{story.HOSTILE}")
    with opened(browser, html, tmp_path) as (tab, _, said):
        assert tab.title() == "gemma-2-2b-alpaca: finished"
        assert any("Content Security Policy" in text for text in said)
        assert tab.locator("#chart-loss .plot").count() == 1
