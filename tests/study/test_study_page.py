"""The study's page and its Markdown: every number with its interval, inert, self-contained, honest about what is missing."""

from __future__ import annotations

import base64
import io
import re
import runpy
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archipel import store
from archipel.report import scores, svg
from archipel.report.svg_file import standalone
from archipel.study import page, page_charts, publish
from archipel.study.markdown import docs_page, md
from archipel.study.page_reading import StudyFiles, duration, flat, sentence
from archipel.study.sheets import LARGEST, sheet

_FIXTURE = runpy.run_path(str(Path(__file__).parent / "page_fixture.py"))
GOOD, HOSTILE, PRIMARY, write_study = (_FIXTURE[name] for name in ("GOOD", "HOSTILE", "PRIMARY", "write_study"))
VOID = {"meta", "img", "source", "br", "link", "input"}


class Seen(HTMLParser):
    """Elements with attributes, visible text, tags that are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.open, self.unbalanced = "", list[str](), list[str]()
        self.feed(text)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)
        self.text += " "

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with everything, not to be changed."""
    return write_study(tmp_path_factory.mktemp("whole") / "study")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def text(whole: Path) -> str:
    return page.render_study(whole)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with few kept clips, not to be changed."""
    return write_study(tmp_path_factory.mktemp("small") / "study", shown=("real", "top1", "top2", "monolith"))  # type: ignore[no-any-return]


@pytest.fixture
def light(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study to be damaged; its page shows one caption, for speed."""
    monkeypatch.setattr(page, "ROWS", 1)
    return Path(shutil.copytree(small, tmp_path / "study"))


def changed(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "study.json") -> Path:
    value = store.read_json(folder / name)
    change(value)
    store.write_json(folder / name, value)
    return folder


def headline(folder: Path) -> str:
    return re.search(r'<h1 id="headline">(.*?)</h1>', page.render_study(folder))[1]  # type: ignore[index]


def test_every_section_is_there_and_balanced(text: str) -> None:
    seen = Seen(text)
    assert seen.unbalanced == [] and seen.open == [] and len(text) < 6e6
    ids = {attributes.get("id") for _, attributes in seen.elements}
    assert all(link["href"][1:] in ids for link in seen.all("a") if link["href"].startswith("#"))
    for said in ("Not there", "Could not be shown", "could not be read"):
        assert said not in seen.text


def test_the_main_table_has_every_score_with_its_interval_in_the_papers_order(text: str, whole: Path) -> None:
    results = text[text.index('<h2 id="results">') : text.index('<h2 id="plots">')]
    table = results[results.index("<table") : results.index("</table>")]
    arms = re.findall(r'<th scope="row"[^>]*><i class="key \w+" aria-hidden="true"></i>(.*?)(?: <em|</th>)', table)
    assert arms[:3] == ["Real clips", "Codec only", "Archipelago, top-1"] and arms[-1] == "Oracle router"
    assert arms.index("Monolith, batch B/K, K times the steps") < arms.index("Monolith") < arms.index("Uniform mixture")
    assert "K = 8 at the same compute" not in arms and "K = 8 at the same compute" in results
    seen = Seen(table).text
    for row in store.read_json(whole / "table.json"):
        if row["set"] == "test" and row["metric"] == PRIMARY and row["arm"] not in ("k8", "real"):
            assert f"{row['value']:.4f}{row['low']:.4f} to {row['high']:.4f}" in seen, row["arm"]
    for column in ("seeds", "parameters", "training FLOPs", "samples", "updates", "sampling FLOPs per clip"):
        assert column in seen
    assert "1.004 × baseline" in seen and "64,000" in seen
    assert re.search(rf'<th scope="col" title="{PRIMARY}" class="begins primary">', table)
    assert "<b>" not in table and "<strong>" not in table


def test_raw_distances_are_folded_away_beside_their_floor(text: str) -> None:
    head, _, rest = text.partition("Raw Fréchet distances, Test captions")
    assert head.rstrip().endswith("<summary>")
    folded = rest[: rest.index("</details>")]
    assert "FVD" in folded and "Real clips" in folded
    assert ">FD-transnet<" not in head


def test_the_answer_stands_in_the_headline_with_its_interval_and_the_goal(text: str) -> None:
    seen = Seen(text).text
    assert (
        "The better monolith lies 1.79 times as far from the real clips as the archipelago (95 % interval 1.48 to 2.10)"
        in seen
    )
    assert "a ratio of 2 with the interval above 1.5, is not reached" in seen
    assert "1.004 times the baseline's FLOPs" in seen and "goal 2" in seen
    assert "the best monolith by KID-efficientnet-appearance on the validation clips" in seen


@pytest.mark.parametrize(
    ("ratio", "difference", "start"),
    [
        ((2.2, 1.7, 2.7), (-0.02, -0.03, -0.01), "The better monolith lies 2.2 times"),
        ((0.7, 0.6, 0.8), (0.01, 0.005, 0.015), "The monolith came nearer"),
        ((1.1, 0.8, 1.4), (-0.002, -0.004, 0.001), "No difference"),
        ((1.2, 0.9, 1.5), (-0.02, -0.03, -0.01), "No difference"),
        ((1.2, 1.1, 1.3), (-0.02, -0.05, 0.01), "No difference"),
        (None, (-0.02, -0.03, -0.01), "The archipelago came nearer to the real clips than the monolith; by how many"),
        (None, (None, None, None), "No difference"),
    ],
)
def test_claims_follow_both_intervals(light: Path, ratio: Any, difference: Any, start: str) -> None:
    def change(study: dict[str, Any]) -> None:
        row = next(one for one in study["comparisons"] if one["primary"])
        row["ratio"] = dict(zip(("value", "low", "high"), ratio, strict=True)) if ratio else None
        row["difference"] = dict(zip(("value", "low", "high"), difference, strict=True))

    assert headline(changed(light, change)).startswith(start)
    reached = "is reached" in page.render_study(light)
    assert reached == (ratio is not None and ratio[0] == 2.2)


def test_a_goal_that_does_not_count_is_not_called_reached(light: Path) -> None:
    def change(study: dict[str, Any]) -> None:
        row = next(one for one in study["comparisons"] if one["primary"])
        row["ratio"] = {"value": 2.2, "low": 1.7, "high": 2.7}
        row["reached"] = False  # copying grew
        study["copying"]["test"] = {"grew": True, "verdict": "it copies more"}

    assert "is reached in numbers and does not count" in page.render_study(changed(light, change))


def test_few_clips_carry_no_conclusion(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", groups=40, shown=("real",))
    assert headline(folder).endswith("too few clips to conclude")
    text = page.render_study(folder)
    assert 'class="verdict warn"' in text and "40 content groups, at least 100" in text and "reached" in text


def test_what_speaks_against_the_headline_is_said(light: Path) -> None:
    def change(study: dict[str, Any]) -> None:
        next(one for one in study["comparisons"] if one["primary"])["circle"] = True
        study["copying"]["test"] = {"grew": True, "verdict": "it copies more"}
        study["seeds"] = [0]
        next(one for one in study["arms"] if one["name"] == "top1")["costs"]["training_flops"] *= 1.3

    text = page.render_study(changed(light, change))
    for said in ("a circle", "Copying grew: it copies more", "1.3 times", "One seed"):
        assert said in text
    assert 'class="verdict good"' not in text and "matched:" not in text


def test_nothing_outside_is_asked_for(text: str) -> None:
    seen = Seen(text)
    for tag, attributes in seen.elements:
        for name in ("src", "srcset", "href", "poster", "data", "action", "style"):
            value = attributes.get(name, "")
            assert value == "" or value.startswith(("data:image/webp;base64,", "#")), (tag, name, value[:60])
    assert not re.search(r"url\(|@import|@font-face", text)
    assert [link for link in re.findall(r"https?://[^\s\"'<]+", text) if link != "http://www.w3.org/2000/svg"] == []
    policy = next(meta["content"] for meta in seen.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_captions_are_inert(text: str) -> None:
    seen = Seen(text)
    assert HOSTILE not in text and " ".join(HOSTILE.split()) in seen.text
    assert len(seen.all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in seen.elements for name in attributes)


def test_every_text_of_the_files_is_escaped(light: Path) -> None:
    bad = "\"'><img src=x onerror=alert(1)>"

    def spoil(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: spoil(inner) for key, inner in part.items()} | {bad: bad}
        if isinstance(part, list):
            return [spoil(inner) for inner in part]
        keep = {*GOOD, "lines", "bars", "intervals", "test", "train"}
        return part + bad if isinstance(part, str) and part not in keep else part

    for name in ("study.json", "table.json"):
        store.write_json(light / name, spoil(store.read_json(light / name)))
    seen = Seen(page.render_study(light))
    assert all(image["src"].startswith("data:image/") for image in seen.all("img")) and seen.all("img")
    assert not any("onerror" in attributes for _, attributes in seen.elements)
    assert seen.unbalanced == [] and bad in seen.text


def test_samples_follow_the_rule_real_clips_first_and_move(text: str) -> None:
    from PIL import Image

    seen = Seen(text)
    clips = [image for image in seen.all("img") if image.get("class") == "clip"]
    assert len(clips) == 2 * 8 * 8
    assert [image["alt"].partition(":")[0] for image in clips[:3]] == ["Real clips", "Codec only", "Archipelago, top-1"]
    assert seen.text.count("Rule: the first 8 captions, seed 0. 8 shown.") == 2
    for image in clips[:3]:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as decoded:
            assert decoded.n_frames == 8 and decoded.size == (32, 32)


def test_pictures_stay_within_their_budget(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BUDGET", 60_000)
    part = page.samples(StudyFiles(whole))["sets"][0]
    assert 1 <= len(part["rows"]) < 8 and len(part["columns"]) == 8


def test_ablations_curve_pilot_protocols_and_repeat(text: str) -> None:
    seen = Seen(text).text
    for said in (
        "Does an expert know its own cluster's captions better than the others'?",
        "0.0120 (0.0090 to 0.0150)",
        "What it says: Late.",
        "The ratio against training FLOPs per arm",
        "The ratio against width of an expert",
        "Every arm had as many trials: Archipelago, top-1 4, Monolith 4.",
        "expert.batch = 4",
        "abababababababab",
        "ab12ab12ab12ab12…",
        "partition.method = random",
        "archipel study emoji --seeds 5",
        "2dc05fb76b26026389e25f4774b732fcaefa8f5b",
        "arm better: 4 of 5",
        "5.0 h",
    ):
        assert said in seen, said
    assert "test, train" in seen  # a protocol's key that differs between prompt sets is not told as one


def test_unequal_trials_are_called_unequal(light: Path) -> None:
    seen = Seen(page.render_study(changed(light, lambda study: study["pilot"]["trials"].pop()))).text
    assert "did not have equally many trials: Archipelago, top-1 4, Monolith 3" in seen


@pytest.mark.parametrize(
    "gone",
    [
        "arms",
        "sets",
        "baseline",
        "comparisons",
        "copying",
        "paired",
        "ablations",
        "curve",
        "pilot",
        "samples",
        "members",
        "primary",
    ],
)
@pytest.mark.parametrize("value", [3, ["x", {}], {"a": None}])
def test_a_part_missing_or_of_another_shape_never_stops_the_page(light: Path, gone: str, value: Any) -> None:
    page.context(StudyFiles(changed(light, lambda study: study.update({gone: value}))))


def test_a_study_of_other_shapes_throughout_still_has_a_page(light: Path) -> None:
    for value in (None, 3, "x", ["x", {}], {"a": None}):
        store.write_json(light / "study.json", dict.fromkeys(store.read_json(light / "study.json"), value))
        assert Seen(page.render_study(light)).unbalanced == []


def test_missing_parts_are_said(light: Path) -> None:
    def change(study: dict[str, Any]) -> None:
        for name in ("comparisons", "baseline", "paired", "ablations", "pilot", "samples", "members", "copying"):
            del study[name]

    changed(light, change)
    (light / "table.json").unlink()
    seen = Seen(page.render_study(light)).text
    for said in (
        "not compared yet",
        "table.json: is not there",
        "table.json has no rows",
        "study.json holds no comparisons",
        "how the baseline was chosen",
        "no values per seed",
        "study.json holds no ablations",
        "study.json names no samples",
        "no pilot trials are recorded",
        "study.json lists no members",
        "say nothing on copying",
    ):
        assert said in seen, said


@pytest.mark.parametrize("content", [b"{torn", b"[1, null, {}]", b'{"a": null}', b"\xff\xfe\x00", b"[]", b"3"])
@pytest.mark.parametrize("name", ["study.json", "table.json", "samples/test/s0/top1.safetensors"])
def test_a_damaged_file_is_said_and_never_stops_the_page(light: Path, name: str, content: bytes) -> None:
    (light / name).write_bytes(content)
    text = page.render_study(light)
    assert Seen(text).unbalanced == [] and str(light) not in text
    if content == b"{torn" or name.startswith("samples"):
        assert "Files that could not be read" in text and name in text


def test_an_arm_without_clips_is_named(light: Path) -> None:
    (light / "samples" / "test" / "s0" / "monolith.safetensors").unlink()
    store.write_tensors(light / "samples/test/s0/top2.safetensors", {"clips": np.zeros((2, 3), np.uint8)})
    seen = Seen(page.render_study(light)).text
    assert "kept clips of Archipelago, top-2, Monolith." in seen


def test_clips_of_a_study_whose_seeds_begin_later_are_found(light: Path) -> None:
    (light / "samples" / "test" / "s0").rename(light / "samples" / "test" / "s7")
    assert StudyFiles(light).first_seed("test") == "7" and StudyFiles(light).first_seed("../..") == "0"
    assert page.gather(StudyFiles(light), "test")[2] == []


def test_validation_clips_choose_and_are_no_result(light: Path) -> None:
    rows = [row | {"set": "validation"} for row in store.read_json(light / "table.json") if row["set"] == "test"]
    store.write_json(light / "table.json", store.read_json(light / "table.json") + rows)
    found = page.context(StudyFiles(light))
    assert [table["set"] for table in found["results"]["tables"]] == ["test", "train"]
    assert len(found["forests"]["charts"]) == 2 and len(found["measured"]["sets"]["rows"]) == 3


@pytest.mark.parametrize("arm", ["../../../secret", "..", "a/b", "", "a\0b"])
def test_names_of_a_strangers_file_do_not_leave_the_folder(light: Path, arm: str) -> None:
    store.write_tensors(light.parent / "secret.safetensors", {"clips": np.zeros((1, 2, 8, 8, 3), np.uint8)})
    files = StudyFiles(light)
    assert files.clips("test", arm, "0") is None and files.clips(arm, "top1", "0") is None
    assert files.clips("test", "top1", arm) is None


def test_an_unknown_kind_of_chart_is_said_and_the_others_stay(light: Path) -> None:
    seen = Seen(page.render_study(changed(light, lambda study: study["ablations"][0]["chart"].update(kind="pie")))).text
    assert "unknown kind 'pie'" in seen and "What it says: Late." in seen


def test_the_same_files_give_the_same_bytes(light: Path) -> None:
    first = page.write_page(light).read_bytes()
    assert page.write_page(light) == light / "index.html" and (light / "index.html").read_bytes() == first


def test_decimals_fit_the_interval() -> None:
    shown = scores.interval_text({"value": 0.21784, "low": 0.21664, "high": 0.21904})
    assert shown == "0.2178 (0.2166 to 0.2190)"
    assert scores.interval_text({"value": 279.01, "low": 262.3, "high": 301.8}) == "279 (262 to 302)"
    assert scores.interval_text({"value": -0.02, "low": -0.03, "high": -0.01}) == "−0.020 (−0.030 to −0.010)"
    assert scores.interval_text({"value": 0.5, "low": 0.5, "high": 0.5}) == "0.5 (0.5 to 0.5)"
    assert scores.interval_text({"value": 2e-6, "low": 1e-6, "high": 3e-6}).startswith("2 × 10⁻⁶")
    assert (
        scores.interval_text({"value": 1.5, "low": None, "high": None}) == "1.5" and scores.interval_text(None) == "–"
    )
    assert scores.cell({"value": -0.04, "low": -0.8, "high": 1.2}) == {"value": "0.0", "interval": "−0.8 to 1.2"}
    assert scores.cell({"value": 0.0004, "low": 0.0003, "high": 0.0005}, 3) == {
        "value": "0.00040",
        "interval": "0.00030 to 0.00050",
    }


def test_charts_of_ablations_hold_their_values() -> None:
    chart = {
        "kind": "bars",
        "x": "K",
        "y": "KID",
        "series": [{"name": "a", "points": [[2, 0.5, 0.4, 0.6], [4, -0.25]]}],
    }
    drawn = str(page_charts.ablation_chart(chart))
    assert drawn.count("<rect") == 2 and drawn.count('class="whisker"') == 1 and "−0.25" in drawn
    lines = str(page_charts.ablation_chart(chart | {"kind": "lines"}))
    assert "polyline" in lines and lines.count("span thin") == 1
    assert page_charts.ablation_chart({"kind": "intervals", "series": []}) == ""


def test_ticks_of_a_narrow_axis_are_told_apart() -> None:
    text = str(svg.line_chart([svg.Series("a", [0, 1], [0.69271, 0.69287])], "a", "x", "y"))
    labels = re.findall(r'text-anchor="end">(0\.69\d*)<', text)
    assert len(labels) >= 3 and len(set(labels)) == len(labels)


def test_small_helpers() -> None:
    assert sentence("one fixed expert") == "One fixed expert." and sentence("") == "" and sentence("Why?") == "Why?"
    assert [duration(s) for s in (3, 120, 7200)] == ["3 s", "2.0 min", "2.0 h"]
    assert list(flat({"a": {"b_c": 1, "d": [1, "x"]}, "e": None})) == [("a b c", 1), ("a d", "1, x")]


def test_the_docs_page_has_the_numbers_and_the_files_it_shows(small: Path, tmp_path: Path) -> None:
    from PIL import Image

    path = docs_page(small, tmp_path / "docs", "2026-11-24-cpu")
    text = path.read_text(encoding="utf-8")
    shown = re.findall(r"\]\(([^)]+)\)", text)
    assert len(shown) == 12 and all((path.parent / name).is_file() for name in shown)
    assert "1.79 times as far" in text and "| Archipelago, top-1 (primary arm) | 0.0224 (0.0196 to 0.0252) |" in text
    assert "What it says: Late." in text and "    archipel study emoji --seeds 5" in text and "## Limits" not in text
    assert str(tmp_path) not in text and "\n\n\n" not in text
    folder = path.parent / "2026-11-24-cpu"
    assert (folder / "table.json").read_bytes() == (small / "table.json").read_bytes()
    for name in ("samples-test.webp", "samples-train.webp"):
        assert (folder / name).stat().st_size <= LARGEST
        with Image.open(folder / name) as opened:
            assert opened.n_frames == 8
    for name in shown:
        if name.endswith(".svg"):
            drawn = (path.parent / name).read_text(encoding="utf-8")
            assert (
                drawn.startswith("<svg")
                and "<style>" in drawn
                and "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
            )


def test_markdown_is_inert() -> None:
    assert md("a|b\n<script> *x* _y_ [z](w) `c` & d") == (
        "a\\|b &lt;script&gt; \\*x\\* \\_y\\_ \\[z\\](w) \\`c\\` &amp; d"
    )


def test_tables_of_the_docs_page_have_as_many_cells_as_columns(light: Path, tmp_path: Path) -> None:
    def change(study: dict[str, Any]) -> None:
        del study["samples"]
        study["arms"][2]["title"] = "top | 1\n<b>"

    text = docs_page(changed(light, change), tmp_path, "page").read_text(encoding="utf-8")
    assert "Top \\| 1 &lt;b&gt;" in text and "<b>" not in text
    widths: list[int] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(set(widths)) <= 1, line
            widths = []


def test_publish_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], light: Path) -> None:
    assert publish.main([str(tmp_path / "none"), str(tmp_path)]) == 1
    assert "holds no finished study" in capsys.readouterr().err
    assert publish.main([str(light), str(tmp_path), "--name", "../x"]) == 1
    assert "is no name for a page" in capsys.readouterr().err
    changed(light, lambda study: study.pop("samples"))
    assert publish.main([str(light), str(tmp_path), "--name", "ok"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "ok.md")


def test_a_sheet_of_large_noisy_clips_stays_small() -> None:
    clips = np.random.default_rng(0).integers(0, 256, (4, 4, 200, 200, 3), np.uint8)
    data = sheet(["one", "two", "three", "four"], ["a", "b"], [clips, clips], 8)
    assert len(data) <= LARGEST
    with pytest.raises(ValueError, match="no clips"):
        sheet([], [], [], 8)


def test_a_legend_is_drawn_into_the_file() -> None:
    from archipel.report.svg import Series, line_chart

    chart = str(line_chart([Series("a <b>\x00", [0, 1], [0, 1]), Series("c", [0, 1], [1, 0], "t1")], "x", "x", "y"))
    drawn = standalone(chart)
    assert "a &lt;b&gt;" in drawn and drawn.count('r="4.5"') == 2 and "var(--card)" in drawn
    with pytest.raises(ValueError, match="no chart"):
        standalone("<p>x</p>")
    with pytest.raises(ValueError, match="well-formed"):
        standalone("<svg")
