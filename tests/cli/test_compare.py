"""``compare``: many runs from one command, stopped and gone on with, and the tables that come of them."""

import csv
import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, Commands

from sparsetwin.cli.compare import _is_smoke_test
from sparsetwin.comparison._contenders import changed
from sparsetwin.errors import UsageError
from sparsetwin.recipes import find_recipe
from sparsetwin.training import RunFolder

LENGTHS = ("--schedule.warmup", 0.25, "--schedule.sparse", 0.25, "--schedule.dense", 0.25,
           "--schedule.final-dense", 0.25, "--schedule.final-sparse", 0.25)  # fmt: skip
ONE = ("compare", "digits", *TINY, "--epochs", 1, *LENGTHS)


def table(folder: Path, name: str = "comparison") -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def final(run: Path) -> Any:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def stamps(folder: Path) -> dict[str, int]:
    return {
        str(p): p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and p.parent != folder and ".logs" not in p.parts
    }


@pytest.fixture(scope="module")
def compared(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, one sparsity, one seed: a comparison that has ended; tests do not change it."""
    cli = Commands(server, tmp_path_factory.mktemp("compared"))
    done = cli.run(*ONE, "--methods", "acdc", "static", "--seeds", 1, "--jobs", 2, "--out", "c", "--json")
    assert done.code == 0, done.err
    (cli.folder / "said.json").write_text(json.dumps({"out": done.out, "err": done.err}))
    return cli.folder / "c"


class TestTables:
    def test_the_csv_holds_the_numbers_of_the_runs_in_full(self, compared: Path) -> None:
        acdc, static = table(compared)
        assert (acdc["label"], static["label"]) == ("acdc", "static")
        for row in (acdc, static):
            run = final(compared / "runs" / row["label"] / "0.9" / "seed-0")
            member = run["members"]["sparse"]
            assert float(row["accuracy"]) == member["test"]["accuracy"]
            assert float(row["achieved_sparsity"]) == member["sparsity"]
            assert float(row["training_share"]) == run["training_flops"] / run["dense_training_flops"]
            assert float(row["inference_share"]) == member["forward_flops"] / run["dense_forward_flops"]
            twin = run["members"].get("dense")  # static trains none
            assert row["twin_accuracy"] == ("" if twin is None else repr(twin["test"]["accuracy"]))
            assert (row["seeds"], row["failed"], row["deviation"], row["half_width"]) == ("1", "0", "", "")
        assert (acdc["difference"], acdc["pairs"], acdc["verdict"]) == ("", "0", "–")
        difference = float(static["accuracy"]) - float(acdc["accuracy"])
        assert float(static["difference"]) == pytest.approx(difference)
        assert (static["pairs"], static["p_value"], static["verdict"]) == ("1", "", "ranks nothing")

    def test_markdown_and_page_say_the_same_and_how_it_came_about(self, compared: Path) -> None:
        markdown = (compared / "comparison.md").read_text().splitlines()
        assert [line.split(" | ")[0] for line in markdown[2:]] == ["| acdc", "| static"]
        assert "ranks nothing" in markdown[3]
        page = (compared / "comparison.html").read_text()
        for said in ("Settings were not tuned", "Holm", "seeds: 1", "smoke test", "Differences are to acdc",
                     "the last epoch", "a dense training of 1 epochs", "sparsetwin compare digits",
                     "ranks nothing"):  # fmt: skip
            assert said in page, said
        assert "http://" not in page.replace("http://www.w3.org", "")
        assert page.count("<svg") == 2

    def test_the_last_line_is_json_and_numbers_that_there_are_not_are_null(self, compared: Path) -> None:
        told = json.loads((compared.parent / "said.json").read_text())
        *_, last = told["out"].strip().splitlines()
        rows = json.loads(last)["epochs"]
        assert [row["label"] for row in rows] == ["acdc", "static"]
        assert rows[0]["deviation"] is None
        assert rows[1]["verdict"] == "ranks nothing"
        assert json.loads(last)["flops"] == []
        assert "2 of 2 runs finished" in told["err"] or "1 of 2 runs finished" in told["err"]
        assert "This comparison is a smoke test" in told["out"]

    def test_every_run_is_one_like_any_other(self, compared: Path) -> None:
        run = compared / "runs" / "acdc" / "0.9" / "seed-0"
        assert (run / "report.html").exists()
        described = json.loads((run / "run.json").read_text())
        assert described["config"]["train"]["dense_finetune"] is False
        assert described["threads"] == 1


class TestGoingOn:
    def test_what_has_finished_is_not_run_again(self, cli: Commands, compared: Path) -> None:
        before, csv_before = stamps(compared), (compared / "comparison.csv").read_bytes()
        (compared / "comparison.csv").unlink()
        done = cli.run(*ONE, "--methods", "acdc", "static", "--seeds", 1, "--out", compared, "--quiet")
        assert done.code == 0, done.err
        assert stamps(compared) == before
        assert (compared / "comparison.csv").read_bytes() == csv_before

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--methods", "acdc", "gmp", "--seeds", 1), "its contenders differ"),
            (("--methods", "acdc", "static", "--seeds", 1, "--sparsities", 0.8), "its sparsities differ"),
            (("--methods", "acdc", "static", "--seeds", 1, "--optimizer.lr", 0.01), "its recipe differs"),
        ],
    )
    def test_another_comparison_in_the_same_folder_is_refused(
        self, server: Any, compared: Path, tmp_path: Path, flags: tuple[object, ...], message: str
    ) -> None:
        before = stamps(compared)
        done = Commands(server, tmp_path).run(*ONE, *flags, "--out", compared)
        assert done.code == 1
        assert "holds another comparison" in done.error
        assert message in done.error
        assert stamps(compared) == before

    def test_more_seeds_methods_and_equal_flops_are_added_to_what_there_is(self, cli: Commands, compared: Path) -> None:
        shutil.copytree(compared, cli.folder / "c")
        before = stamps(cli.folder / "c")
        grown = (*ONE, "--methods", "acdc", "static", "set", "--seeds", 2, "--equal-flops", "static", "--out", "c")
        done = cli.run(*grown, "--quiet")
        assert done.code == 0, done.err
        assert before.items() <= stamps(cli.folder / "c").items()
        rows = {row["label"]: row for row in table(cli.folder / "c")}
        assert {label: row["seeds"] for label, row in rows.items()} == {"acdc": "2", "static": "2", "set": "2"}
        assert {row["label"] for row in table(cli.folder / "c", "comparison-equal-flops")} == {"acdc", "static"}
        described = json.loads((cli.folder / "c" / "comparison.json").read_text())
        first = json.loads((compared / "comparison.json").read_text())
        assert [before["command"] for before in described["before"]] == [first["command"]]
        assert "--seeds 2" in described["command"]
        page = (cli.folder / "c" / "comparison.html").read_text()
        assert "part 1" in page
        assert "This comparison has grown" in page
        assert "This comparison has grown" not in (compared / "comparison.html").read_text()
        assert "Equal training FLOPs: of static, those" in page
        smaller = cli.run(*ONE, "--methods", "acdc", "static", "--seeds", 1, "--out", "c")
        assert smaller.code == 1
        assert "its contenders differ" in smaller.error

    def test_records_alone_are_enough_for_the_tables_and_to_grow(self, cli: Commands, compared: Path) -> None:
        shutil.copytree(compared, cli.folder / "c")
        acdc, static = (cli.folder / "c" / "runs" / label / "0.9" / "seed-0" for label in ("acdc", "static"))
        for folder in (acdc / "checkpoints", acdc / "pair"):
            assert any(folder.iterdir())
        (cli.folder / "c" / "comparison.csv").unlink()
        grown = (*ONE, "--methods", "acdc", "static", "dense", "--seeds", 1, "--out", "c", "--quiet")
        done = cli.run(*grown, "--keep", "records")
        assert done.code == 0, done.err
        record = ["metrics.jsonl", "report.html", "run.json", "timing.jsonl"]
        for run in (acdc, static):
            assert sorted(path.name for path in run.iterdir()) == record
            assert (run / "metrics.jsonl").read_bytes() == (
                compared / run.relative_to(cli.folder / "c") / "metrics.jsonl"
            ).read_bytes()
        assert {row["label"]: row["accuracy"] for row in table(cli.folder / "c")}.items() >= {
            row["label"]: row["accuracy"] for row in table(compared)
        }.items()
        dense = cli.folder / "c" / "runs" / "dense" / "dense" / "seed-0"
        assert sorted(path.name for path in dense.iterdir()) == ["metrics.jsonl", "pair", *record[1:]]
        before = stamps(cli.folder / "c")
        assert cli.run(*grown).code == 0
        assert stamps(cli.folder / "c") == before

    def test_the_page_says_which_runs_were_made_elsewhere(self, cli: Commands, compared: Path) -> None:
        shutil.copytree(compared, cli.folder / "c")
        description = cli.folder / "c" / "runs" / "static" / "0.9" / "seed-0" / "run.json"
        described = json.loads(description.read_text())
        description.write_text(json.dumps({**described, "machine": {**described["machine"], "cpus": 99}}))
        same = (*ONE, "--methods", "acdc", "static", "--seeds", 1, "--out", "c", "--quiet")
        assert cli.run(*same).code == 0
        page = (cli.folder / "c" / "comparison.html").read_text()
        assert page.count("1 of 2: python") == 2
        assert page.count("cpus 99") == 1
        assert f"instructions {described['machine']['instructions']}" in page
        assert "2 of 2: python" in (compared / "comparison.html").read_text()

    def test_a_begun_run_goes_on_with_the_data_where_they_are_now(self, cli: Commands, compared: Path) -> None:
        shutil.copytree(compared, cli.folder / "c")
        run = RunFolder(cli.folder / "c" / "runs" / "static" / "0.9" / "seed-0")
        numbers = run.metrics.read_bytes()
        shutil.rmtree(run.checkpoints)
        run.metrics.unlink()
        run.description.write_text(json.dumps({**run.read(), "data": "/moved/away"}))
        done = cli.run(*ONE, "--methods", "acdc", "static", "--seeds", 1, "--out", "c", "--quiet")
        assert done.code == 0, done.err
        assert run.metrics.read_bytes() == numbers

    def test_pairs_can_be_kept_without_checkpoints(self, cli: Commands, compared: Path) -> None:
        shutil.copytree(compared, cli.folder / "c")
        flags = ("--methods", "acdc", "static", "--seeds", 1, "--out", "c", "--keep", "pairs", "--quiet")
        done = cli.run(*ONE, *flags)
        assert done.code == 0, done.err
        for label in ("acdc", "static"):
            run = cli.folder / "c" / "runs" / label / "0.9" / "seed-0"
            assert (run / "pair" / "pair.json").exists()
            assert not (run / "checkpoints").exists()

    def test_a_run_of_other_settings_is_not_taken_for_one_of_the_comparison(
        self, cli: Commands, compared: Path
    ) -> None:
        shutil.copytree(compared, cli.folder / "c")
        description = cli.folder / "c" / "runs" / "static" / "0.9" / "seed-0" / "run.json"
        described = json.loads(description.read_text())
        described["config"]["optimizer"]["lr"] *= 2
        description.write_text(json.dumps(described))
        done = cli.run(*ONE, "--methods", "acdc", "static", "--seeds", 1, "--out", "c")
        assert done.code == 1
        assert "static/0.9/seed-0 has other settings than this comparison would give it (optimizer)" in done.error

    @pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
    def test_one_that_is_stopped_goes_on_and_ends_with_the_same_numbers(
        self, cli: Commands, compared: Path, number: signal.Signals
    ) -> None:
        command = (*ONE, "--methods", "acdc", "static", "--seeds", 1, "--jobs", 1, "--out", "c",
                   "--train.checkpoint-epochs", 1)  # fmt: skip
        slow = ("--model.name", "tiny_networks:convolutional")
        running = cli.start(*command, *slow)
        run = cli.folder / "c" / "runs" / "acdc" / "0.9" / "seed-0"
        assert running.until(lambda: (run / "metrics.jsonl").exists())
        running.send(number)
        stopped = running.wait()
        assert stopped.code == 130
        assert "stopped and saved; the same command goes on" in stopped.err
        assert not (cli.folder / "c" / "comparison.csv").exists()
        done = cli.run(*command, *slow)
        assert done.code == 0, done.err
        for name in ("acdc", "static"):
            ours, theirs = (folder / "runs" / name / "0.9" / "seed-0" for folder in (cli.folder / "c", compared))
            assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()

    def test_its_runs_save_and_stop_when_it_is_killed(self, cli: Commands) -> None:
        slow = ("--epochs", 400, "--model.name", "tiny_networks:convolutional")
        running = cli.start(*ONE, *slow, "--methods", "dense", "--seeds", 1, "--out", "c")
        folder = RunFolder(cli.folder / "c" / "runs" / "dense" / "dense" / "seed-0")
        assert running.until(lambda: (folder.path / "metrics.jsonl").exists())
        running.send(signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
        give_up = time.monotonic() + 60
        while is_locked(folder):
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert not folder.is_finished
        assert list((folder.path / "checkpoints").glob("step-*.pt"))


def is_locked(folder: RunFolder) -> bool:
    try:
        with folder.locked():
            return False
    except UsageError:
        return True


def test_a_run_that_comes_to_nothing_is_shown_as_failed_and_not_tried_again(cli: Commands) -> None:
    command = (*ONE, "--methods", "acdc", "wild=static,optimizer.lr=1e30", "--seeds", 1, "--out", "c")
    done = cli.run(*command)
    assert done.code == 0, done.err
    wild = next(row for row in table(cli.folder / "c") if row["label"] == "wild")
    assert (wild["seeds"], wild["failed"], wild["accuracy"], wild["verdict"]) == ("0", "1", "", "–")
    assert "0 (1 failed)" in (cli.folder / "c" / "comparison.md").read_text()
    why = cli.folder / "c" / "runs" / "wild" / "0.9" / "seed-0" / "failed.txt"
    assert "a lower learning rate" in why.read_text()
    before = stamps(cli.folder / "c")
    assert cli.run(*command).code == 0
    assert stamps(cli.folder / "c") == before


@pytest.mark.slow
def test_equal_flops_small_dense_networks_and_pretraining(cli: Commands) -> None:
    done = cli.run(
        "compare", "digits", "--epochs", 1, *LENGTHS, "--model.options", "width=0.25", "--methods", "acdc", "static",
        "dense", "small-dense-flops", "oneshot-pretrained", "--seeds", 1, "--equal-flops", "--out", "c",
        "--sparsities", 0.75,
    )  # fmt: skip
    assert done.code == 0, done.err
    folder = cli.folder / "c"
    rows = {row["label"]: row for row in table(folder)}
    assert [row["sparsity"] for row in rows.values()] == ["", "0.75", "0.75", "0.75", "0.75"]
    share = {label: float(row["training_share"]) for label, row in rows.items()}
    assert share["dense"] == pytest.approx(1, abs=0.01)
    of_acdc = float(rows["acdc"]["inference_share"])
    assert float(rows["small-dense-flops"]["inference_share"]) == pytest.approx(of_acdc, rel=0.1)
    assert share["small-dense-flops"] == pytest.approx(float(rows["small-dense-flops"]["inference_share"]), rel=0.02)
    own = final(folder / "runs" / "oneshot-pretrained" / "0.75" / "seed-0")
    before = final(folder / "runs" / "dense" / "dense" / "seed-0")
    assert share["oneshot-pretrained"] == pytest.approx(
        (own["training_flops"] + before["training_flops"]) / own["dense_training_flops"]
    )
    assert share["oneshot-pretrained"] > 1.2
    longer = {row["label"]: row for row in table(folder, "comparison-equal-flops")}
    epochs = round(share["acdc"] / share["static"])
    assert epochs > 1
    assert set(longer) == {"dense", "acdc", "static", "small-dense-flops"}
    run = json.loads((folder / "equal-flops" / "static" / "0.75" / "seed-0" / "run.json").read_text())
    assert run["config"]["train"]["epochs"] == epochs
    assert float(longer["static"]["training_share"]) == pytest.approx(epochs * share["static"], rel=0.05)
    assert float(longer["acdc"]["training_share"]) == share["acdc"]
    page = (folder / "comparison.html").read_text()
    assert "Equal training FLOPs" in page
    assert "as those of the dense baseline: oneshot-pretrained" in page
    described = json.loads((folder / "runs" / "oneshot-pretrained" / "0.75" / "seed-0" / "run.json").read_text())
    assert described["config"]["pretrained"] == str((folder / "runs" / "dense" / "dense" / "seed-0").resolve())


@pytest.mark.slow
def test_settings_are_chosen_on_the_holdout_at_a_seed_of_their_own(cli: Commands) -> None:
    done = cli.run(*ONE, "--methods", "static", "str", "--seeds", 1, "--trials", 3, "--out", "c")
    assert done.code == 0, done.err
    folder = cli.folder / "c"
    trials = [folder / "trials" / "static" / "0.9" / f"trial-{index}" for index in range(3)]
    held = [final(run)["members"]["sparse"]["holdout"]["accuracy"] for run in trials]
    configs = [json.loads((run / "run.json").read_text())["config"] for run in trials]
    chosen = json.loads((folder / "runs" / "static" / "0.9" / "seed-0" / "run.json").read_text())["config"]
    assert {config["seed"] for config in configs} == {1000}
    found = configs[held.index(max(held))]
    assert found["train"].pop("test") is False
    assert chosen == {**found, "seed": 0}
    for run in trials:
        assert "test" not in final(run)["members"]["sparse"]
        assert '"test"' not in (run / "pair" / "pair.json").read_text()
        assert "of the hold-out" in (run / "report.html").read_text()
    page = (folder / "comparison.html").read_text()
    assert "the best of 3 trials for each method and sparsity" in page
    best = held.index(max(held))
    rows = table(folder, "comparison-tuning")
    assert [row["label"] for row in rows] == ["static"] * 3 + ["str"] * 3
    initial = [row["settings"].removeprefix("method.options.initial ") for row in rows if row["chosen"] == "True"][1]
    run = json.loads((folder / "runs" / "str" / "0.9" / "seed-0" / "run.json").read_text())
    assert f"{run['config']['method']['options']['initial']:.4g}" == initial
    rows = rows[:3]
    assert [float(row["holdout_accuracy"]) for row in rows] == held
    assert [row["chosen"] for row in rows] == [str(trial == best) for trial in range(3)]
    assert rows[best]["settings"].startswith(f"optimizer.lr {configs[best]['optimizer']['lr']:.4g}, optimizer.weight")
    row = (folder / "comparison-tuning.md").read_text().splitlines()[2]
    spent = sum(final(run)["training_flops"] for run in trials) / final(trials[0])["dense_training_flops"]
    assert row.split(" | ")[-1].rstrip(" |") == f"{100 * spent:.1f}%"
    assert rows[best]["settings"] in page
    assert math.isfinite(float(table(folder)[0]["accuracy"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "acdc", "rigel"), "unknown contender 'rigel'; known: acdc, cram"),
        (("--methods", "acdc", "acdc"), "contenders of different labels"),
        (("--seeds", 0), "at least one sparsity and one seed"),
        (("--sparsities", 90), "sparsities are fractions between 0 and 1"),
        (("--reference", "gmp", "--methods", "acdc"), "compared with gmp, which is not among: acdc"),
        (("--methods", "a=rigl,schedule.start=1.0"), "a at sparsity 0.9: a schedule of kind periodic takes no"),
        (("--jobs", -1), "at least one run at a time"),
        (("--methods", "acdc", "topkast", "--sparsities", 0.3), "topkast at sparsity 0.3: more weights are updated"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    cli: Commands, flags: tuple[object, ...], message: str
) -> None:
    done = cli.run(*ONE, *flags, "--out", "c")
    assert done.code == 2, done.err
    assert message in done.error
    assert cli.entries() == []


def test_a_folder_with_other_files_is_left_alone(cli: Commands) -> None:
    (cli.folder / "c").mkdir()
    (cli.folder / "c" / "notes.txt").write_text("mine")
    done = cli.run(*ONE, "--out", "c")
    assert done.code == 1
    assert "holds other files" in done.error
    assert [path.name for path in (cli.folder / "c").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("recipe", "changes", "expected"),
    [
        ("cifar10-resnet20", {}, False),
        ("cifar10-resnet20", {"train.epochs": 15}, False),
        ("cifar10-resnet20", {"train.epochs": 14}, True),
        ("cifar10-resnet20", {"dataset.samples": 500}, True),
        ("cifar10-resnet20", {"dataset.samples": 20_000}, False),
        ("digits", {"train.epochs": 1000}, True),
        ("charlm-gpt", {"train.epochs": 15}, False),
    ],
)
def test_what_is_too_short_or_too_small_to_rank_is_judged_by_epochs_and_data(recipe, changes, expected):
    assert _is_smoke_test(changed(find_recipe(recipe), changes)) == expected
