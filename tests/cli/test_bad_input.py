"""Bad input: a code that is not 0, one clear message, nothing left that blocks the corrected command."""

import shutil
import signal
from pathlib import Path

import pytest
from commands import SHORT, TINY, Commands, events, outcome

from sparsetwin.cli._recipe_flags import split_name

WRONG: dict[str, tuple[tuple[object, ...], str]] = {
    "command": (("trian",), "unknown command 'trian'; known: train, resume"),
    "recipe": (("train", "digit"), "unknown recipe 'digit'; known: digits, cifar10-resnet20"),
    "flag": (("train", "--optimizer.learning-rate", "1"), "Unrecognized options: --optimizer.learning-rate"),
    "flag's nearest": (("train", "--schedule.sparsty", ".5"), "--schedule.sparsity"),
    "value": (("train", "--epochs", "many"), "invalid literal for int"),
    "choice": (("train", "--method.name", "acd"), "unknown method 'acd'"),
    "field": (("train", "--epochs", "0"), "epochs needs to be at least 1, got 0"),
    "learning rate": (("train", "--optimizer.lr", "-1"), "lr needs to be a finite number that is not negative"),
    "nan": (("train", "--train.checkpoint-epochs", "nan"), "checkpoint_epochs needs to be positive, got nan"),
    "accumulation": (("train", "--train.accumulation", "7"), "batch_size 64 cannot be cut into 7 equal parts"),
    "threads": (("train", "--threads", "-1"), "threads needs to be 0 (torch's choice) or more, got -1"),
    "logger": (("train", "--logger", "wandbb"), "('tensorboard', 'wandb', 'mlflow')"),
    "model": (("train", "--model.name", "digits_cn"), "unknown model 'digits_cn'"),
    "model's nearest": (("train", "--model.name", "digits_cn"), "did you mean 'digits_cnn'?"),
    "option": (("train", *TINY, "--model.options", "widht=3"), "has no option 'widht'; it has: num_classes, width"),
    "option without value": (("train", "--model.options", "width"), "expected NAME=VALUE, got 'width'"),
    "option's kind": (("train", "--model.options", "width=abc"),
                      "digits_cnn cannot be built with --model.options width='abc':"),
    "plan's option": (("schedule", "imagenet-resnet50", "--model.options", "num_classes=abc"),
                      "resnet50 cannot be built with --model.options num_classes='abc':"),
    "outputs": (("train", "--model.options", "num_classes=2"),
                "--model.options num_classes=2 has too few outputs for data of 10 classes; leave it out"),
    "method's option": (("train", "--method.name", "rigl", "--method.options", "drop_fraction=abc"),
                        "--method.options drop_fraction: expected float, got 'abc'"),
    "layers": (("train", "--method.per-layer", "conv1=0.3", "conv2=0.7", "conv3=0.8", "fc=0.5"),
               "0.761240751 together, the schedule 0.9, to which theirs would be scaled; add --schedule.sparsity 0.76"),
    "plan's layers": (("schedule", "digits", "--method.per-layer", "conv1=0.3", "conv2=0.7", "conv3=0.8", "fc=0.5"),
                      "together, the schedule 0.9, to which theirs would be scaled; add --schedule.sparsity 0.76124"),
    "own network's layers": (("train", *TINY, "--method.per-layer", "0=0.5", "4=0.5", "8=0.75"),
                             "together, the schedule 0.9, to which theirs would be scaled; add --schedule.sparsity 0."),
    "layers in steps": (("train", *TINY, "--schedule.unit", "steps", "--method.name", "static", "--no-dense-finetune",
                         "--method.per-layer", "0=0.5", "4=0.5", "8=0.75"), "to which theirs would be scaled"),
    "method's score": (("train", "--method.options", "score=5"), "--method.options score: expected str, got 5"),
    "seed": (("train", "--seed", "99999999999999999999"), "seed is a whole number from 0 to 2**63 - 1, got 9999999"),
    "negative seed": (("train", "--seed", "-1"), "seed is a whole number from 0 to 2**63 - 1, got -1"),
    "many threads": (("train", "--threads", "99999999999"), "threads is at most 65536, got 99999999999"),
    "no model": (("train", "--model.name", "tiny_networks:not_a_model"), "is a int, which cannot be called"),
    "no module": (("train", "--model.name", "tiny_networks:gives_no_module"), "returned a int, not a torch.nn.Module"),
    "model's module": (("train", "--model.name", "tiny_netwroks:slow"), "cannot import 'tiny_netwroks'"),
    "model's name": (("train", "--model.name", "tiny_networks:sloww"), "did you mean 'slow'?"),
    "recipe's module": (("train", "nowhere:recipe"), "cannot import 'nowhere'"),
    "recipe's result": (("train", "os:getcwd"), "returned a str, not a sparsetwin.recipes.Recipe"),
    "recipe's kind": (("train", "os:sep"), "expected a function that returns a Recipe"),
    "schedule": (("train", "--epochs", "12"), "do not fit into a run of 12; train for at least 25 epochs (--epochs 25"),
    "paper's length": (("train", "cifar100-wrn28-10", "--epochs", "100"),
                       "takes 200 epochs, the run has 100; train for 200 epochs (--epochs 200)"),
    "paper and lengths": (("train", "cifar100-wrn28-10", "--schedule.sparse", "5"), "add --schedule.paper None"),
    "paper's name": (("train", "--schedule.paper", "imagenet-10"), "unknown schedule 'imagenet-10'; known: imagenet"),
    "phases": (("train", "--schedule.phases", "30", "0", "29", "0.9"), "add up to 59 epochs, the run has 60"),
    "tiny phase": (("train", "--schedule.sparse", "0.0001"), "--schedule.sparse: 0.0001 epochs are less than"),
    "no phase": (("train", "--schedule.dense", "0"), "--schedule.dense is 0 epochs; give it a length"),
    "phases and sparsity": (("train", "--sparsity", "0.9", "--schedule.phases", "30", "0", "30", "0.5"),
                            "--schedule.sparsity 0.9 would do nothing; give one of them"),
    "plan's phases and sparsity": (("schedule", "--sparsity", "0.9", "--phases", "50", "0", "50", "0.5"),
                                   "--schedule.sparsity 0.9 would do nothing; give one of them"),
    "ramp": (("train", "--method.name", "gmp", "--schedule.ramp", "2"), "kind gradual takes no --schedule.ramp"),
    "plan's ramp": (("schedule", "digits", "--method.name", "gmp", "--ramp", "2"),
                    "kind gradual takes no --schedule.ramp"),
    "rounds": (("train", "--schedule.rounds", "2"), "kind alternating takes no --schedule.rounds; leave it out"),
    "plan's rounds": (("schedule", "--rounds", "2"), "kind alternating takes no --schedule.rounds; leave it out"),
    "sparsity": (("train", "--sparsity", "1"), "sparsity is a fraction of zeros in [0, 1), got 1.0"),
    "percent": (("train", "--sparsity", "90"), "for 90% write 0.9"),
    "pattern": (("train", *SHORT, "--targets.exclude", "conv9"), "'conv9' matches no parameter of the model"),
    "finetune": (
        ("train", "--method.name", "dense", "--dense-finetune"), "dense throughout; leave it out (--no-dense-finetune)"
    ),
    "dense end": (("train", "--schedule.final-sparse", "0"), "this schedule ends dense"),
    "device": (("train", "--device", "cuda:7"), "device 'cuda:7' cannot be used here"),
    "device's name": (("train", "--device", "gpu"), "device 'gpu' cannot be used here"),
    "data": (("train", "--data", "nowhere"), "the digits come with sparsetwin and are read from no folder"),
    "no data": (("train", "cifar10-resnet20", "--data", "nowhere"), "nowhere is not a folder"),
    "no text": (("train", "charlm-gpt"), "text comes with no data; give a UTF-8 text file"),
    "batch": (("train", "--train.batch-size", "5000"), "1210 training samples do not fill one batch of 5000"),
    "hold-out": (("train", "--dataset.holdout", "1"), "fraction in [0, 1), got 1.0"),
    "nearly no data": (("train", *SHORT, "--dataset.holdout", "0.999"), "training samples do not fill one batch"),
    "no run": (("resume", "nowhere"), "nowhere is no run folder: it has no run.json"),
    "eval of no run": (("eval", "nowhere"), "nowhere is no run folder"),
    "report on no run": (("report", "nowhere"), "nowhere/run.json is missing"),
    "report on nothing": (("report",), "Missing from sparsetwin report: RUN"),
    "schedule's recipe": (("schedule", "digit"), "did you mean 'digits'?"),
    "schedule's lengths": (("schedule", "--epochs", "30"), "do not fit into a run of 30"),
    "schedule in steps": (("schedule", "--unit", "steps"), "lengths in steps say nothing about epochs"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gets_one_clear_message_and_leaves_nothing(cli: Commands, name: str) -> None:
    arguments, message = WRONG[name]
    done = cli.run(*arguments)
    assert done.code in (1, 2)
    assert message in done.error
    assert done.out == "" or done.out.startswith("4 epochs")
    assert done.err.count("error:") + done.err.count("╭") == 1
    assert cli.entries() == []


def test_a_recipe_is_also_found_behind_its_options(cli: Commands) -> None:
    done = cli.run("train", "--out", "run", "--quiet", "cifar10-resnet20", "--data", "nowhere")
    assert "nowhere is not a folder; expected one with Parquet shards" in done.error


@pytest.mark.parametrize(
    "switch",
    ["--fsdp", "--dense-finetune", "--no-dense-finetune", "--qat", "--train.compile", "--train.no_compile",
     "--dataset.no-augment", "--optimizer.nesterov", "--targets.dense_first", "--method.qat", "--json"],
)  # fmt: skip
def test_a_recipe_is_found_behind_every_switch(cli: Commands, switch: str) -> None:
    done = cli.run("train", "--out", "run", switch, "cifar10-resnet20", "--data", "nowhere")
    assert "--fsdp shards" in done.error if switch == "--fsdp" else "nowhere is not a folder" in done.error


def test_a_recipes_name_that_is_the_value_of_an_option_is_no_recipe() -> None:
    for option in ("--out", "--data", "--pretrained", "--schedule.paper", "--train.teacher"):
        assert split_name(["--quiet", option, "digits"]) == (None, ["--quiet", option, "digits"])


@pytest.mark.parametrize("kind", ["run", "full", "file", "beneath a file", "link", "nowhere"])
def test_a_folder_that_cannot_take_a_run_is_refused_and_stays_as_it_was(
    cli: Commands, trained: Path, kind: str
) -> None:
    out = cli.folder / "out"
    expected = "holds a run already; continue it with: sparsetwin resume"
    if kind == "run":
        shutil.copytree(trained, out)
    elif kind == "full":
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
        expected = "holds other files"
    elif kind == "file":
        out.write_text("precious")
        expected = "is no folder"
    elif kind == "beneath a file":
        (cli.folder / "file").write_text("precious")
        out = cli.folder / "file" / "out"
        expected = "Not a directory"
    elif kind == "link":
        out.symlink_to(cli.folder / "nowhere")
        expected = "is no folder"
    else:
        out = Path("/proc/out")
        expected = "cannot write /proc/out/run.json"
    before = {path: path.read_bytes() for path in cli.folder.rglob("*") if path.is_file() and ".logs" not in path.parts}
    done = cli.run("train", *SHORT, *TINY, "--out", out)
    assert done.code == 1
    assert expected in done.error
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_failed_run_leaves_an_empty_folder_empty_and_takes_new_parents_away(cli: Commands) -> None:
    (cli.folder / "empty").mkdir()
    for out in ("empty", "new/deep/run"):
        assert cli.run("train", *SHORT, "--targets.exclude", "conv9", "--out", out).code == 1
    assert cli.entries() == ["empty"]
    assert list((cli.folder / "empty").iterdir()) == []
    assert cli.run("train", *SHORT, *TINY, "--out", "empty").code == 0


def test_a_loss_that_is_nan_from_the_start_leaves_the_folder_free(cli: Commands) -> None:
    done = cli.run("train", *SHORT, *TINY, "--optimizer.lr", "1e30", "--out", "run")
    assert done.code == 1
    assert "the loss is nan at step" in done.error
    assert cli.entries() == []


def test_a_loss_that_becomes_nan_keeps_the_last_good_checkpoint_and_resuming_says_the_same(cli: Commands) -> None:
    breaks = ("--model.name", "tiny_networks:breaks", "--dataset.holdout", "0")
    done = cli.run("train", *SHORT, *breaks, "--train.checkpoint-epochs", "0.5", "--out", "run")
    assert done.code == 1
    assert "the loss is nan at step 51 (main)" in done.error
    assert "The checkpoint of step 50 is kept" in done.error
    run = cli.folder / "run"
    before = outcome(run)
    assert b"NaN" not in before["metrics.jsonl"]
    again = cli.run("resume", "run")
    assert again.code == 1
    assert "the loss is nan at step 51 (main)" in again.error
    assert "Resuming leads here again; train with other settings into another folder (--out)" in again.error
    assert outcome(run) == before
    assert cli.run("eval", "run", "--half", "sparse").code == 0


def test_weights_that_break_in_the_last_step_of_a_phase_are_not_saved(cli: Commands) -> None:
    spoils = ("--model.name", "tiny_networks:spoils", "--dataset.holdout", "0")
    done = cli.run("train", *SHORT, *spoils, "--out", "run")
    assert done.code == 1
    assert "is not finite after step 42 (main)" in done.error
    members = {name for name in outcome(cli.folder / "run") if name.endswith(".safetensors")}
    assert members == {"dense-raw.safetensors"}  # of the phase before


@pytest.mark.parametrize("file_bytes", [2_000, 8_000, 20_000])
def test_a_full_disk_is_told_and_the_run_goes_on_to_the_same_bytes_when_there_is_space(
    cli: Commands, trained: Path, file_bytes: int
) -> None:
    run = cli.folder / "run"
    done = cli.run("train", *SHORT, *TINY, "--quiet", "--out", "run", file_bytes=file_bytes)
    assert done.code == 1
    assert "error:" in done.error
    assert done.err.count("error:") == 1
    assert "run/" in done.error
    if "cannot write run/run.json" in done.error:
        assert cli.entries() == []
        return
    assert not list(run.rglob("*.tmp"))
    assert "once there is space, continue with: sparsetwin resume run" in done.error
    assert cli.run("resume", "run", "--quiet").code == 0
    assert outcome(run) == outcome(trained)


def test_an_unknown_half_is_refused_with_the_nearest_before_the_data_are_read(cli: Commands, trained: Path) -> None:
    done = cli.run("eval", trained, "--half", "spars", "--data", "nowhere")
    assert done.code == 1
    assert "it has dense, dense-best, dense-raw, sparse, sparse-best; did you mean 'sparse'?" in done.error


def test_a_corrupted_half_is_not_evaluated(cli: Commands, trained: Path) -> None:
    run = shutil.copytree(trained, cli.folder / "run")
    half = run / "pair" / "sparse.safetensors"
    half.write_bytes(half.read_bytes()[:-1])
    done = cli.run("eval", "run")
    assert done.code == 1
    assert "sparse.safetensors of member 'sparse' is corrupted" in done.error


def test_a_run_without_a_member_or_an_epoch_can_be_asked_about(cli: Commands) -> None:
    running = cli.start("train", *SHORT, "--model.name", "tiny_networks:slow_from_the_start", "--out", "run")
    assert running.until(lambda: bool(events(cli.folder / "run")))
    assert "run/pair has no members yet" in cli.run("eval", "run").error
    report = cli.run("report", "run", "--out", "page.html")
    assert report.code == 0
    assert "Still running: no epoch of 4 has finished." in report.out
    running.send(signal.SIGKILL)
    running.wait()
