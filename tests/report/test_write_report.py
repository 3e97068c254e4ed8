import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from run_folders import LAYERS, events, write_lines, write_run

from sparsetwin.errors import CheckpointError, ConfigError
from sparsetwin.report import write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """A page taken apart; fails on elements that are not closed in order."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.text, self.ids, self.used, self.attributes = [], [], [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href"):
                self.used.append(value)
            if name == "aria-labelledby":
                self.used += [f"#{part}" for part in value.split()]
            self.used += re.findall(r"url\((.*?)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def report(folders, out):
    content = write_report(folders, out).read_text()
    return Page(content), content


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return report([write_run(root / "a")], root / "report.html")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / "a"), write_run(root / "b", sparsity=0.95, seed=3), write_run(root / "c", epochs=17)]
    return report(runs, root / "report.html")


def test_the_page_tells_verdict_pair_layers_masks_zeros_flops_and_setting(one):
    page, _ = one
    assert "Dense 97.78% and sparse 96.94% at 90% sparsity." in page.words
    for heading in ("The pair", "Loss and accuracy", "Sparsity of every layer", "Mask change between sparse phases"):
        assert heading in page.words
    for heading in ("Zeros in dense phases", "Training FLOPs", "How to get the same run", "Configuration"):
        assert heading in page.words
    assert "sparsetwin train digits --out runs/a --schedule.sparsity 0.9 --seed 0" in page.words
    assert "schedule.sparsity 0.9" in page.words
    assert "6,545 of 65,440" in page.words
    assert all(name in page.words for name in LAYERS)
    assert "1,309" in page.words  # zeros at the ends of dense phases
    assert "samples a second" in page.words


def test_every_figure_is_an_svg_with_a_title_a_description_and_a_caption(one):
    page, content = one
    assert page.tags.count("svg") == page.tags.count("figure") == page.tags.count("figcaption") == 7
    assert page.tags.count("desc") == 7
    assert content.count('role="img" aria-labelledby=') == 7
    assert "sparse phase 7 ends at step 1,200 with" in content or "sparse phase 7 ends at step 1200 with" in content
    assert "dense-finetune" in page.words
    assert "img" not in page.tags


@pytest.mark.parametrize("which", ["one", "several"])
def test_the_page_needs_no_other_file_and_no_script(which, request):
    page, content = request.getfixturevalue(which)
    assert "://" not in content
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(page.tags)
    assert not any(name.startswith("on") or name == "src" for _, name, _ in page.attributes)
    assert "@import" not in content
    assert all(reference.startswith("#") for reference in page.used)
    assert "default-src 'none'" in content


@pytest.mark.parametrize("which", ["one", "several"])
def test_every_reference_within_the_page_has_its_one_target(which, request):
    page, _ = request.getfixturevalue(which)
    assert len(page.ids) == len(set(page.ids))
    assert {reference.removeprefix("#") for reference in page.used} <= set(page.ids)


def test_figures_take_their_colours_from_the_page_in_light_and_dark(one):
    _, content = one
    figures = "".join(re.findall(r"<svg.*?</svg>", content, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) <= {"#000000"}
    used = set(re.findall(r"var\(--([\w-]+)\)", figures))
    dark = content[content.index("prefers-color-scheme: dark") :]
    assert used
    assert all(f"--{name}:" in dark for name in used)


def test_headings_do_not_skip_a_rank(several):
    ranks = [int(tag[1]) for tag in several[0].tags if re.fullmatch("h[1-6]", tag)]
    assert ranks[0] == 1
    assert ranks.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(ranks))


def test_equal_runs_give_equal_bytes(tmp_path):
    first = write_report([write_run(tmp_path / "x" / "a")], tmp_path / "1.html").read_bytes()
    assert write_report([tmp_path / "x" / "a"], tmp_path / "2.html").read_bytes() == first
    assert write_report([write_run(tmp_path / "y" / "a")], tmp_path / "3.html").read_bytes() == first


def test_a_users_plot_settings_neither_change_the_page_nor_are_changed(tmp_path):
    import matplotlib

    folder = write_run(tmp_path / "a")
    plain = write_report([folder], tmp_path / "1.html").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert write_report([folder], tmp_path / "2.html").read_bytes() == plain
        assert dict(matplotlib.rcParams) == before


def test_text_from_the_run_is_text_on_the_page(tmp_path):
    evil = '</style><script>alert("1")</script>&amp; $x_1$ 层'
    lines = events()
    for line in lines:
        if line["event"] == "phase":
            line["layers"] = {f"{name}{evil}": counts for name, counts in line["layers"].items()}
            line["member"] = line["member"] and evil
        if line.get("stage") == "dense-finetune":
            line["stage"] = f"_{evil}"
    folder = write_run(
        tmp_path / "<b>a&b",
        recipe=evil,
        command=evil,
        git_commit=evil,
        created=evil,
        config={evil: {"a": evil}},
        machine={"cpu": evil},
        versions={"sparsetwin": evil},
    )
    lines[-1]["members"][evil] = lines[-1]["members"]["sparse"]
    write_lines(folder / "metrics.jsonl", lines)
    page, content = report([folder], tmp_path / "report.html")
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<script" not in content
    assert page.text.count(evil) >= 6
    assert f"{evil}.a" in page.text
    several, _ = report([folder, write_run(tmp_path / "other")], tmp_path / "several.html")
    assert "script" not in several.tags


def test_a_run_in_progress_is_reported_as_far_as_it_is(tmp_path):
    page, _ = report([write_run(tmp_path / "a", epochs=6)], tmp_path / "report.html")
    assert "Still running: epoch 6 of 30, in a sparse phase (90%)" in page.words
    assert "has not finished" in page.words
    assert "The pair" not in page.words
    assert page.tags.count("svg") == 4  # loss, accuracy, zeros, FLOPs


def test_a_run_before_its_first_epoch_has_a_page_without_figures(tmp_path):
    page, _ = report([write_run(tmp_path / "a", epochs=0)], tmp_path / "report.html")
    assert "no epoch of 30 has finished" in page.words
    assert "svg" not in page.tags


def test_a_run_without_hold_out_command_and_times_is_reported(tmp_path):
    folder = write_run(tmp_path / "a", command=None)
    (folder / "timing.jsonl").unlink()
    lines = [line | ({"holdout": None} if "holdout" in line else {}) for line in events()]
    lines[-1]["members"] = {"dense": lines[-1]["members"]["dense"] | {"holdout": None}}
    lines[-1]["dense_training_flops"] = lines[0]["dense_training_flops"] = 0
    write_lines(folder / "metrics.jsonl", lines)
    page, _ = report([folder], tmp_path / "report.html")
    assert page.tags.count("svg") == 7
    assert "pre" not in page.tags
    assert "samples a second" not in page.words


def test_a_run_of_very_many_phases_keeps_its_figures_readable(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = events()
    phase = next(line for line in lines if line["event"] == "phase" and line["mask_change"])
    many = [phase | {"phase": i, "start": 10 * i, "stop": 10 * i + 10, "step": 10 * i + 10} for i in range(120)]
    lines[0]["phases"] = [[line["start"], line["stop"], 0.9] for line in many]
    write_lines(folder / "metrics.jsonl", [lines[0], *(line for line in lines if line["event"] == "epoch"), *many])
    _, content = report([folder], tmp_path / "report.html")
    change = re.search(r'<svg[^>]*aria-labelledby="run-change-title.*?</svg>', content, flags=re.DOTALL)
    assert change
    assert len(re.findall(r"<text", change[0])) < 30


def test_layers_are_in_the_order_of_their_numbers(one):
    page, _ = one
    table = page.words[page.words.index("Layers as a table") :]
    names = ("features.3.weight", "features.6.weight", "features.10.weight")
    assert sorted(names, key=table.index) == list(names)


def test_losses_far_apart_are_on_a_logarithmic_axis_and_near_ones_are_not(tmp_path):
    folder = write_run(tmp_path / "a")
    _, far = report([folder], tmp_path / "far.html")
    lines = [
        line | ({"train": {"loss": 3.5, "accuracy": 0.3}, "holdout": None} if "train" in line else {})
        for line in events()
    ]
    write_lines(folder / "metrics.jsonl", lines)
    _, near = report([folder], tmp_path / "near.html")
    assert "loss, logarithmic" in far
    assert "loss, logarithmic" not in near


def test_a_poor_beginning_does_not_flatten_the_accuracies_and_is_told_of(tmp_path, one):
    folder = write_run(tmp_path / "a")
    lines = events()
    lines[1]["holdout"] = {"loss": 2.3, "accuracy": 0.1}
    lines[2]["holdout"] = {"loss": None, "accuracy": None}
    write_lines(folder / "metrics.jsonl", lines)
    page, _ = report([folder], tmp_path / "report.html")
    assert "The first epochs lie below the axis." in page.words
    assert "below the axis" not in one[0].words


def test_dead_weights_are_told_of_or_that_there_are_none(tmp_path, one):
    assert "At most 2% (1,309) were still zero as a later dense phase ended." in one[0].words
    folder = write_run(tmp_path / "a")
    write_lines(folder / "metrics.jsonl", [line | ({"zeros": 0} if "zeros" in line else {}) for line in events()])
    page, _ = report([folder], tmp_path / "report.html")
    assert "None was still zero as a later dense phase ended." in page.words


def test_unknown_events_are_mentioned(tmp_path):
    folder = write_run(tmp_path / "a")
    write_lines(folder / "metrics.jsonl", [*events(), {"event": "memorisation"}])
    page, _ = report([folder], tmp_path / "report.html")
    assert "left out: memorisation" in page.words


def test_weights_whose_flops_are_not_counted_are_mentioned(tmp_path):
    folder = write_run(tmp_path / "a")
    first, *others = events()
    names = [f"rnn.weight_ih_l{index}" for index in range(7)]
    write_lines(folder / "metrics.jsonl", [first | {"uncounted": names}, *others])
    page, _ = report([folder], tmp_path / "report.html")
    said = "FLOPs are too low: what is computed with rnn.weight_ih_l0, rnn.weight_ih_l1"
    assert said in page.words
    assert "rnn.weight_ih_l4 and 2 more is not counted" in page.words


def test_several_runs_are_compared_and_then_told_one_by_one(several):
    page, content = several
    assert "3 runs compared" in page.words
    assert "c (still running)" in page.words
    assert 'id="comparison-loss-title"' in content
    assert all(f'id="run-{index}-loss-title"' in content for index in (1, 2, 3))
    assert page.tags.count("svg") == 2 + 3 * 7
    differing = page.words[page.words.index("What differs") :]
    assert "schedule.sparsity 0.9 0.95 0.9" in differing
    assert "optimizer.lr 0.1 0.1" not in differing


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    page, _ = report([write_run(tmp_path / "x" / "a"), write_run(tmp_path / "y" / "a")], tmp_path / "report.html")
    assert "x/a, y/a" in page.words
    assert "What differs" not in page.words
    assert str(tmp_path) not in page.words


def test_no_run_or_one_run_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one run folder, got none"):
        write_report([], tmp_path / "report.html")
    folder = write_run(tmp_path / "a")
    with pytest.raises(ConfigError, match="each run folder is compared once"):
        write_report([folder, tmp_path / "." / "a"], tmp_path / "report.html")


def test_a_run_that_cannot_be_read_leaves_the_old_page(tmp_path):
    folder = write_run(tmp_path / "a")
    page = write_report([folder], tmp_path / "report.html")
    old = page.read_bytes()
    (folder / "run.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(CheckpointError, match="version 9"):
        write_report([folder], page)
    assert page.read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "report.html"]


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    folder = write_run(tmp_path / "a")
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*taken"):
        write_report([folder], tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "taken"]


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, sparsetwin.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
