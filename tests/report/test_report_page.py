"""The page as text: complete from whatever there is, inert, self-contained, and no bolder than its numbers."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from archipel import config as configuration
from archipel import store
from archipel.evaluation import verdicts
from archipel.report import checks, report, scores
from archipel.report.stage import render
from archipel.run import Run

VOID = {"meta", "img", "source", "br", "link", "input"}
HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Elements with their attributes, visible text, and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.inside, self.open = "", "", list[str]()
        self.unbalanced: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
            self.text += " " if self.open[-1] in ("td", "th", "dd", "dt", "p", "li", "h1") else ""

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(run: Run) -> Page:
    return Page(render(run))


def test_a_finished_run_has_every_section_and_balanced_tags(full_run: Run) -> None:
    path = report(full_run)
    assert path == full_run.root / "report" / "index.html"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 6e6
    seen = Page(text)
    assert seen.unbalanced == [] and seen.open == []
    ids = {attributes.get("id") for _, attributes in seen.elements}
    for link in seen.all("a"):
        assert link["href"].startswith("#") and link["href"][1:] in ids
    assert (
        "Not there yet" not in seen.text
        and "Could not be shown" not in seen.text
        and "could not be read" not in seen.text
    )
    for words in (
        "Moving samples",
        "Scores",
        "The router",
        "Training",
        "Ledger",
        "Partition",
        "Isolation",
        "Copying",
        "follow their captions",
        "Limits",
    ):
        assert words in seen.text


def test_nothing_outside_is_asked_for(full_run: Run) -> None:
    text = render(full_run)
    seen = Page(text)
    for tag, attributes in seen.elements:
        for name in ("src", "srcset", "href", "poster", "data", "action", "style"):
            value = attributes.get(name, "")
            assert value == "" or value.startswith(("data:image/webp;base64,", "#")), (tag, name, value[:60])
    assert not re.search(r"url\(|@import|@font-face", text)
    assert [link for link in re.findall(r"https?://[^\s\"'<]+", text) if link != "http://www.w3.org/2000/svg"] == []
    policy = next(meta["content"] for meta in seen.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_captions_are_inert(all_pictures: Run) -> None:
    text = render(all_pictures)
    seen = Page(text)
    assert HOSTILE not in text and seen.text.count(HOSTILE) >= 3
    assert len(seen.all("script")) == 1 and not any(
        name.startswith("on") for _, attributes in seen.elements for name in attributes
    )
    assert any(HOSTILE in image["alt"] for image in seen.all("img"))


def test_every_field_of_a_strangers_files_is_escaped(full_run: Run) -> None:
    bad = "\"'><img src=x onerror=alert(1)>"
    folder = full_run.root
    for path in (
        full_run.partition / "quality.json",
        full_run.scores("test"),
        full_run.scores("test").with_name("test.extra.json"),
        full_run.ledger,
        folder / "router" / "quality.json",
    ):
        value = store.read_json(path)

        def spoil(part: object) -> object:
            if isinstance(part, dict):
                return {key: spoil(inner) for key, inner in part.items()} | {bad: bad}
            if isinstance(part, list):
                return [spoil(inner) for inner in part]
            return part + bad if isinstance(part, str) and part not in ("top1", "monolith", "real", "codec") else part

        store.write_json(path, spoil(value))
    card = store.read_json(full_run.clips / "card.json")
    card["provenance"] = {bad: bad, "license": bad}
    store.write_sealed(full_run.clips / "card.json", card)
    seen = page(full_run)
    assert all(image["src"].startswith("data:image/") for image in seen.all("img"))
    assert not any("onerror" in attributes for _, attributes in seen.elements)
    assert seen.unbalanced == [] and bad in seen.text


def test_pictures_decode_and_move(all_pictures: Run) -> None:
    from PIL import Image

    seen = page(all_pictures)
    clips = [image for image in seen.all("img") if image.get("class") == "clip"]
    assert len(clips) >= 8 + 12 * 4 + 6 * 5
    for image in clips:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as decoded:
            assert decoded.n_frames == 8 and decoded.size == (32, 32) and image["alt"]
    stills = seen.all("source")
    assert len(stills) == len(clips) and all(still["media"] == "(prefers-reduced-motion: reduce)" for still in stills)
    with Image.open(io.BytesIO(base64.b64decode(stills[0]["srcset"].partition(",")[2]))) as decoded:
        assert getattr(decoded, "n_frames", 1) == 1


def test_samples_are_the_first_prompts_in_order(all_pictures: Run) -> None:
    prompts = store.read_json(all_pictures.samples("test") / "prompts.json")
    seen = page(all_pictures)
    heads = [image["alt"] for image in seen.all("img") if image["alt"].startswith("Monolith: ")]
    assert heads == [f"Monolith: {prompt['caption']}" for prompt in prompts[:12]]
    assert "the first 12 of 16 prompts" in " ".join(seen.text.split())


@pytest.mark.parametrize(("ratio", "matched"), [(0.81, False), (None, False), (1.0, "true")])
def test_the_word_is_refused_without_the_ledgers_word(full_run: Run, ratio: float | None, matched: object) -> None:
    ledger = store.read_json(full_run.ledger) | {"ratio": ratio, "matched": matched}
    store.write_json(full_run.ledger, ledger)
    text = render(full_run)
    assert "matched" not in text.lower()
    if ratio == 0.81:
        assert "0.81 times the monolith's FLOPs" in page(full_run).text


def test_the_word_is_used_where_the_ledger_says_so(full_run: Run) -> None:
    assert "Training compute is matched" in page(full_run).text and "1.004" in page(full_run).text


def _verdict(run: Run) -> str:
    return re.search(r'<h1 id="headline">(.*?)</h1>', render(run))[1]  # type: ignore[index]


def test_the_headline_follows_the_paired_interval(full_run: Run, scores_of: Callable[..., None]) -> None:
    assert _verdict(full_run) == "The archipelago came nearer to the real clips than the monolith"
    scores_of(full_run, gap=0.02)
    assert _verdict(full_run) == "The monolith came nearer to the real clips than the archipelago"
    scores_of(full_run, gap=-0.004)
    assert _verdict(full_run) == "No difference between archipelago and monolith can be told"
    scores_of(full_run, gap=-0.02, grew=True)
    assert "also copies more" in _verdict(full_run)
    scores_of(full_run, gap=-0.02, groups=40)
    assert _verdict(full_run).endswith("too few clips to conclude") and 'class="verdict warn"' in render(full_run)


def test_a_withheld_probe_says_so(full_run: Run, scores_of: Callable[..., None]) -> None:
    scores_of(full_run, withheld=True)
    assert "Withheld." in page(full_run).text and "under 3 times chance" in page(full_run).text


def test_the_codec_stands_first_and_the_primary_metric_is_marked(full_run: Run) -> None:
    text = render(full_run)
    table = text[text.index("Kernel distances (unbiased)</h3>") :]
    arms = re.findall(
        r'<th scope="row"><i class="key \w+" aria-hidden="true"></i>(.*?)</th>', table[: table.index("</table>")]
    )
    assert arms[:4] == ["Codec only", "Real clips", "Archipelago (top-1)", "Monolith"]
    assert re.search(r'<th scope="col" class="primary">KID-efficientnet-appearance', table)


def test_copying_has_its_own_table_and_says_what_may_be_said(full_run: Run) -> None:
    text = render(full_run)
    section = text[text.index('<h2 id="copying">') : text.index('<h2 id="router">')]
    assert "train-over-test" in section and "Top1 lies no nearer" in section and "0.5 is no copying" in section
    assert (
        "train-over-test" not in text[text.index('<h2 id="scores">') : text.index("What each score was computed with")]
    )


def test_what_evaluation_calls_copying_stands_in_that_table_and_is_explained() -> None:
    assert {scores.family(metric) for metric in verdicts.COPYING} == {scores.COPYING}
    explained = {name for names, _ in checks.MEANINGS for name in names.split(", ")}
    assert explained == set(verdicts.COPYING)


def test_an_empty_run_names_the_command_for_every_part(empty_run: Run) -> None:
    seen = page(empty_run)
    for command in (
        "generate emoji --arms",
        "evaluate emoji",
        "route emoji",
        "partition emoji",
        "prepare emoji",
        "run emoji",
    ):
        assert f"archipel {command}" in seen.text
    assert "not compared yet" in seen.text and "matched" not in seen.text.lower()


@pytest.mark.parametrize("gone", ["samples", "scores", "router", "partition", "experts", "clips", "ledger.json"])
def test_a_run_without_one_part_still_has_a_page(full_run: Run, gone: str) -> None:
    path = full_run.root / gone
    path.rename(full_run.root.parent / f"gone-{path.name}")
    seen = page(full_run)
    assert seen.unbalanced == [] and "Could not be shown" not in seen.text


def test_a_job_still_training_is_named(full_run: Run) -> None:
    (full_run.expert("1") / "card.json").unlink()
    assert "archipel train emoji 1" in page(full_run).text


FILES = (
    "scores/test.json",
    "scores/test.extra.json",
    "ledger.json",
    "router/quality.json",
    "router/calibration.json",
    "partition/quality.json",
    "partition/captions.json",
    "partition/sheet-0.png",
    "samples/test/prompts.json",
    "samples/test/top1.safetensors",
    "clips/card.json",
    "experts/0/card.json",
    "experts/0/metrics.jsonl",
)


@pytest.mark.parametrize("damaged", FILES)
def test_a_damaged_file_never_stops_the_page(full_run: Run, damaged: str) -> None:
    (full_run.root / damaged).write_bytes(b"{torn")
    assert page(full_run).unbalanced == []


@pytest.mark.parametrize("content", [b"[1, null, {}]", b'{"a": null}', b'{"format": 99}', b"\xff\xfe\x00", b"[]", b"3"])
def test_a_run_of_damaged_files_still_has_a_page(full_run: Run, content: bytes) -> None:
    for damaged in FILES:
        (full_run.root / damaged).write_bytes(content)
    seen = page(full_run)
    assert seen.unbalanced == [] and "matched" not in seen.text.lower()


def test_a_torn_file_is_named_without_paths_of_this_machine(full_run: Run, tmp_path: Path) -> None:
    (full_run.root / "router" / "quality.json").write_text("{")
    text = render(full_run)
    assert "router/quality.json" in text and str(tmp_path) not in text


def test_a_source_path_of_this_machine_is_shortened(tmp_path: Path) -> None:
    values = {"clips": {"source": "folder", "path": str(tmp_path / "home" / "films")}}
    text = render(Run.create(tmp_path / "run", configuration.build(values)))
    assert str(tmp_path) not in text and "…/films" in text


def test_a_card_of_another_run_is_left_out(full_run: Run) -> None:
    folder = full_run.expert("0")
    store.write_sealed(folder / "card.json", store.read_json(folder / "card.json") | {"run": "0" * 64})
    seen = page(full_run)
    assert "experts/0/card.json: was written for another run" in seen.text and "archipel train emoji 0" in seen.text


def test_an_expert_that_read_another_shard_is_shown(full_run: Run) -> None:
    folder = full_run.expert("0")
    card = store.read_json(folder / "card.json")
    card["touched"]["read"].append("shards/2/train.safetensors")
    store.write_sealed(folder / "card.json", card)
    assert '<span class="alert">shards/2/train.safetensors</span>' in render(full_run)


def test_the_same_files_give_the_same_bytes_and_a_failure_keeps_the_old_page(
    full_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report(full_run).read_bytes()
    assert report(full_run).read_bytes() == first

    def broken(*_: object) -> str:
        raise RuntimeError("no")

    monkeypatch.setattr("archipel.report.stage.render", broken)
    with pytest.raises(RuntimeError):
        report(full_run)
    assert (full_run.report / "index.html").read_bytes() == first and len(list(full_run.report.iterdir())) == 1


def test_pictures_stay_within_their_budget(all_pictures: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archipel.report.samples.BUDGET", 60_000)
    seen = page(all_pictures)
    rows = sum(image["alt"].startswith("Monolith: ") for image in seen.all("img"))
    assert 1 <= rows < 12 and f"the first {rows} of 16 prompts" in " ".join(seen.text.split())
