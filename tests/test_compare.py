"""`kadapt compare`: the search, the study that survives, and what a comparison does with its cells."""

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kadapt_cli import compare as comparing
from kadapt_cli.compare import search, worker
from kadapt_cli.compare.grid import Grid
from kadapt_cli.config import TrainConfig
from kadapt_cli.data import open_images
from kadapt_cli.errors import (
    CheckFailedError,
    DataError,
    DivergedError,
    KadaptError,
    MachineError,
    ModelError,
    UsageError,
)
from kadapt_cli.evaluate import load_backbone
from kadapt_cli.progress import Display
from kadapt_cli.study import FileStudy, open_study

GRID = {"shots": 5, "search": "coarse"}


def quiet() -> Display:
    return Display(Console(stderr=True), quiet=True)


# --- the search ---


def replay(make, value) -> list[search.Settings]:
    """All settings of a search whose trials have the value of their settings."""
    tried: list[search.Settings] = []
    while (settings := search.following(make(), [value(*s) for s in tried])) is not None:
        tried.append(settings)
    return tried


def test_coarse_tries_every_rate_then_a_large_decay_at_the_best():
    tried = replay(lambda: search.coarse(True), lambda lr, wd: (-abs(lr - 1e-3), 0.0))
    assert tried == [(2e-4, 1e-4), (1e-3, 1e-4), (4e-3, 1e-4), (2e-2, 1e-4), (1e-1, 1e-4), (1e-3, 0.3)]


def test_equal_scores_are_decided_by_the_validation_loss():
    tried = replay(lambda: search.coarse(True), lambda lr, wd: (0.4, -abs(lr - 2e-2)))
    assert tried[-1] == (2e-2, 0.3)


def test_the_probe_gets_as_many_trials_of_its_decay():
    tried = replay(lambda: search.coarse(False), lambda lr, wd: (0.0, 0.0))
    assert [lr for lr, _ in tried] == [None] * search.BUDGETS["coarse"]
    assert len({decay for _, decay in tried}) == len(tried)


def test_a_failed_trial_is_never_the_best():
    tried = replay(lambda: search.coarse(True), lambda lr, wd: search.FAILED if lr > 1e-3 else (0.0, -lr))
    assert tried[-1] == (2e-4, 0.3)


def test_faithful_refines_around_the_peak_within_its_budget():
    peak = 10**-3.5
    tried = replay(lambda: search.faithful(True), lambda lr, wd: (-abs(search.math.log10(wd / peak)), 0.0))
    assert len(tried) == len(set(tried)) <= search.BUDGETS["faithful"]
    for rate in search.FAITHFUL_RATES:
        assert min(abs(search.math.log10(wd / peak)) for lr, wd in tried if lr == rate) < 0.07


def test_optuna_gives_the_budget_and_the_same_trials_again():
    pytest.importorskip("optuna", reason="needs the search extra")

    def value(lr, wd):
        return (-abs(search.math.log10(lr) + 3), 0.0)

    tried = replay(lambda: search.tpe(True, 6, 0), value)
    assert len(tried) == 6
    assert replay(lambda: search.tpe(True, 6, 0), value) == tried
    assert all(1e-5 <= lr <= 1e-1 and 1e-6 <= wd <= 1 for lr, wd in tried)


# --- the study ---


@pytest.fixture(params=["file", "journal"])
def open_again(request, tmp_path):
    """open_again(grid) opens the same study anew, as another process would."""
    if request.param == "journal":
        pytest.importorskip("optuna", reason="needs the search extra")
    storage = None if request.param == "file" else f"journal:{tmp_path / 'study.log'}"
    return lambda grid=GRID: open_study(tmp_path / "out", storage, grid)


def test_records_are_there_for_the_next_process(open_again):
    records = [
        {"kind": "trial", "score": 0.5, "data": "ä|b", "trial": 0},
        {"kind": "failure", "reason": "x", "trial": 1},
    ]
    first, second = open_again(), open_again()
    first.add(records[0])
    assert second.records() == records[:1]
    second.add(records[1])
    assert first.records() == second.records() == open_again().records() == records


def test_one_process_has_a_claim_at_a_time(open_again):
    first, second = open_again(), open_again()
    with first.claim("a") as mine, second.claim("a") as theirs, second.claim("b") as other:
        assert (mine, theirs, other) == (True, False, True)
    with second.claim("a") as again:
        assert again


def test_a_study_of_another_grid_says_what_differs(open_again):
    open_again()
    with pytest.raises(UsageError, match="shots 5, not 10; use these settings, or another place"):
        open_again({"shots": 10, "search": "coarse"})


def test_a_study_of_another_format_is_refused(open_again, monkeypatch):
    open_again()
    monkeypatch.setattr("kadapt_cli.study.FORMAT_VERSION", 3)
    with pytest.raises(UsageError, match="format_version 2, not 3"):
        open_again()


def test_a_storage_out_of_reach_is_one_line_without_its_password(tmp_path):
    pytest.importorskip("optuna", reason="needs the search extra")
    with pytest.raises(MachineError, match="cannot be opened") as caught:
        open_study(tmp_path, f"sqlite:///{tmp_path}/no/such/folder.db", GRID)
    assert "check the path or URL" in str(caught.value)
    with pytest.raises(MachineError) as caught:
        open_study(tmp_path, "nonsense://me:secret@nowhere/db", GRID)
    assert "nonsense://nowhere/db" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_processes_that_open_an_empty_database_at_once_all_get_the_study(tmp_path, monkeypatch):
    """All but one fail as the tables appear: a database says so in its own words."""
    optuna = pytest.importorskip("optuna", reason="needs the search extra")
    from sqlalchemy.exc import ProgrammingError

    real, failures = optuna.storages.RDBStorage.__init__, [2]

    def opened(self, url):
        if failures[0]:
            failures[0] -= 1
            raise ProgrammingError("CREATE TABLE studies", {}, Exception('relation "studies" already exists'))
        real(self, url)

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", opened)
    monkeypatch.setattr("kadapt_cli.study.time.sleep", lambda _: None)
    assert open_study(tmp_path, f"sqlite:///{tmp_path}/study.db", GRID).records() == []
    assert failures == [0]

    failures[0] = 100
    with pytest.raises(MachineError, match=r"cannot be opened .*already exists"):
        open_study(tmp_path, f"sqlite:///{tmp_path}/study.db", GRID)


def test_a_password_is_taken_from_the_environment_alone(run_cli, tmp_path, monkeypatch):
    """Also where the environment has the same: what is typed, other users can see."""
    url = "nonsense://me:secret@nowhere/db"
    for value in (None, url):
        monkeypatch.setenv("KADAPT_STORAGE", value) if value else monkeypatch.delenv("KADAPT_STORAGE", raising=False)
        code, _, error = run_cli("compare", "--data", "demo", "--storage", url, "--out", tmp_path / "c")
        assert (code, "give it by KADAPT_STORAGE instead" in error) == (2, True)
    code, _, error = run_cli("compare", "--data", "demo", "--out", tmp_path / "c")
    assert (code, "nonsense://nowhere/db cannot be opened" in error) == (5, True)
    assert "secret" not in error


def test_what_the_storage_holds_is_held_against_its_digest(tmp_path):
    pytest.importorskip("optuna", reason="needs the search extra")
    log = tmp_path / "log"
    open_study(tmp_path, f"journal:{log}", GRID).add({"kind": "final", "accuracy": 0.5})
    log.write_text(log.read_text().replace("0.5", "0.9"))
    assert open_study(tmp_path, f"journal:{log}", GRID).records() == []


def test_a_storage_that_is_lost_on_the_way_is_one_line(tmp_path):
    pytest.importorskip("optuna", reason="needs the search extra")
    study = open_study(tmp_path, f"sqlite:///{tmp_path}/study.db", GRID)
    with study.claim("a") as mine:
        assert mine
        with sqlite3.connect(tmp_path / "study.db") as connection:
            connection.execute("drop table trial_user_attributes")
        for lost in (study.records, lambda: study.add({"kind": "final"}), lambda: study.claim("b").__enter__()):
            with pytest.raises(
                MachineError, match=r"--storage: sqlite.* cannot be reached .*; the same command goes on"
            ):
                lost()


def test_a_storage_without_a_kind_or_a_driver_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="needs the search extra")
    with pytest.raises(UsageError, match="--storage: nonsense: journal:PATH or the URL of a database was expected"):
        open_study(tmp_path, "nonsense", GRID)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UsageError, match=r"its driver is missing; run: pip install psycopg2"):
        open_study(tmp_path, "postgresql+psycopg2://me:secret@localhost/db", GRID)


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "comparison.csv").write_text("mine")
    with pytest.raises(UsageError, match=r"already holds something else \(comparison.csv, …\); give a new or empty"):
        FileStudy(tmp_path, GRID)
    assert (tmp_path / "comparison.csv").read_text() == "mine"


def test_a_line_cut_by_a_kill_is_passed_over_and_the_next_is_whole(tmp_path):
    study = FileStudy(tmp_path, GRID)
    study.add({"kind": "trial", "trial": 0})
    with (tmp_path / "study.jsonl").open("ab") as file:
        file.write(b'{"kind": "tri')
    study.add({"kind": "trial", "trial": 1})
    assert [r["trial"] for r in FileStudy(tmp_path, GRID).records()] == [0, 1]
    assert [r["trial"] for r in study.records()] == [0, 1]


def test_a_record_is_flushed_and_so_is_the_name_of_the_file(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(os.fstat(number).st_ino), fsync(number)))
    study = FileStudy(tmp_path, GRID)
    file = study.path.stat().st_ino
    assert seen == [file, tmp_path.stat().st_ino]
    study.add({"kind": "trial"})
    assert seen[2:] == [file]


def test_the_claim_of_a_killed_process_ends(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from kadapt_cli.study import FileStudy\n"
        f"with FileStudy(Path({str(tmp_path)!r}), {GRID!r}).claim('a') as mine: print(mine, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    study = FileStudy(tmp_path, GRID)
    with study.claim("a") as mine:
        assert not mine
    process.kill()
    process.wait()
    with study.claim("a") as mine:
        assert mine


def test_a_claim_that_has_stopped_beating_is_void(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="needs the search extra")
    first, second = (open_study(tmp_path, f"journal:{tmp_path / 'log'}", GRID) for _ in range(2))
    holder = first.claim("a")
    assert holder.__enter__()
    with second.claim("a") as mine:
        assert not mine
    monkeypatch.setattr("kadapt_cli.study.STALE_S", 0.5)
    time.sleep(0.6)
    with second.claim("a") as mine:
        assert mine
    holder.__exit__(None, None, None)


# --- comparisons ---


@pytest.fixture(scope="module")
def folders(tasks, tmp_path_factory) -> tuple[str, str]:
    """Two data sets of eight images in each of three classes."""

    root = tmp_path_factory.mktemp("sets")
    for task in ("flowers5", "trashnet"):
        for source in sorted(p for p in (tasks / task).iterdir() if p.is_dir())[:3]:
            (root / task / source.name).mkdir(parents=True)
            for photo in sorted(source.iterdir())[:8]:
                shutil.copy(photo, root / task / source.name)
    return str(root / "flowers5"), str(root / "trashnet")


def grid_of(folders, **changes) -> Grid:
    settings = {"methods": ("linear", "bitfit"), "seeds": (0,), "search_epochs": 1} | changes
    return Grid(data=folders, base=TrainConfig(shots=5, epochs=2, augment="none"), **settings)


def run(grid: Grid, out: Path, **changes) -> comparing.Comparison:
    return comparing.compare(grid, out, quiet(), **({"storage": None, "jobs": 1, "m0": 1e8} | changes))


def test_a_comparison_writes_its_result_and_a_second_run_trains_nothing(folders, tmp_path, monkeypatch):
    document = run(grid_of(folders, search="coarse"), tmp_path).document
    assert json.loads((tmp_path / "comparison.json").read_text()) == document
    keys = "data method shots seed accuracy trainable adapter lr weight_decay trials"
    assert all(set(keys.split()) == set(row) for row in document["rows"])
    assert [(r["data"], r["method"]) for r in document["rows"]] == [
        (data, method) for data in ("flowers5", "trashnet") for method in ("linear", "bitfit")
    ]
    assert {row["trials"] for row in document["rows"]} == {6}
    assert {tuple(entry) for entry in document["table"]} == {("method", "mean", "std", "trainable", "pe")}
    with (tmp_path / "comparison.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    before = (tmp_path / "study.jsonl").read_bytes()
    monkeypatch.setattr(worker, "fit", None)
    assert run(grid_of(folders, search="coarse"), tmp_path).document == document
    assert (tmp_path / "study.jsonl").read_bytes() == before


def test_a_trial_that_was_lost_is_done_again(folders, tmp_path):
    grid = grid_of(folders[:1], methods=("linear",), search="coarse")
    document = run(grid, tmp_path).document
    study = tmp_path / "study.jsonl"
    lines = study.read_text().splitlines(keepends=True)
    study.write_text("".join(line for line in lines if '"trial": 1,' not in line and '"final"' not in line))
    assert run(grid, tmp_path).document["rows"] == document["rows"]


def test_methods_and_seeds_can_be_added_later(folders, tmp_path):
    run(grid_of(folders[:1], methods=("linear",)), tmp_path)
    document = run(grid_of(folders[:1], methods=("linear", "bitfit"), seeds=(0, 1)), tmp_path).document
    assert len(document["rows"]) == 4
    with pytest.raises(UsageError, match="search 'none', not 'coarse'"):
        run(grid_of(folders[:1], search="coarse"), tmp_path)


def scripted(
    monkeypatch, *, test: dict[float, float], val: dict[float, float], trashnet: dict[float, float] | None = None
):
    """Trials and final runs that train nothing: their scores are those of their learning rate."""
    real = worker.prepare
    finals = []

    def prepare(config, out, display, material):
        session = real(config, out, display, material=material)
        here = trashnet if trashnet and "trashnet" in config.data else val
        session.history = [{"val_accuracy": here[config.lr], "val_loss": 1.0, "time_s": 1.0, "kept": True}]
        return session

    def score(self, session):
        finals.append((session.config.lr, len(session.images.splits["train"]), len(session.images.splits["val"])))
        return test[session.config.lr]

    monkeypatch.setattr(worker, "prepare", prepare)
    monkeypatch.setattr(worker, "fit", lambda session, display: None)
    monkeypatch.setattr(worker.Worker, "_test_score", score)
    return finals


RATES = search.COARSE_RATES


def test_the_setting_is_chosen_in_validation_and_trained_on_all_images(folders, tmp_path, monkeypatch):
    """The rate that is best on the test is not the one that is taken."""
    test = dict(zip(RATES, (0.9, 0.5, 0.1, 0.1, 0.1), strict=True))
    val = dict(zip(RATES, (0.1, 0.6, 0.2, 0.2, 0.2), strict=True))
    finals = scripted(monkeypatch, test=test, val=val)
    document = run(grid_of(folders[:1], methods=("bitfit",), search="coarse"), tmp_path).document
    assert [(row["lr"], row["accuracy"]) for row in document["rows"]] == [(1e-3, 0.5)]
    assert finals == [(1e-3, 15, 0)]  # five of each of three classes, validation included


def test_pooled_takes_one_setting_for_all_data_sets_and_seeds(folders, tmp_path, monkeypatch):
    finals = scripted(
        monkeypatch, test=dict.fromkeys(RATES, 0.5), val=dict(zip(RATES, (0.1, 0.2, 0.9, 0.3, 0.1), strict=True))
    )
    grid = grid_of(folders, methods=("bitfit",), seeds=(1, 0), search="coarse", select="pooled")
    document = run(grid, tmp_path).document
    assert {lr for lr, _, _ in finals} == {4e-3}
    assert [(row["seed"], row["trials"]) for row in document["rows"]] == [(1, 6), (0, 6), (1, 6), (0, 6)]
    records = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    trials = [r for r in records if r["kind"] == "trial"]
    assert {r["seed"] for r in trials} == {1}  # only the first seed is searched
    assert len(trials) == 2 * 6


def test_pooled_searches_on_from_what_all_data_sets_say(folders, tmp_path, monkeypatch):
    """The trial with a large decay is made at the rate that is best on average, so that it can be chosen."""
    there = dict(zip(RATES, (0.1, 0.8, 0.7, 0.1, 0.1), strict=True))
    here = dict(zip(RATES, (0.1, 0.1, 0.7, 0.9, 0.1), strict=True))
    scripted(monkeypatch, test=dict.fromkeys(RATES, 0.5), val=here, trashnet=there)
    run(grid_of(folders, methods=("bitfit",), search="coarse", select="pooled"), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
    last = [(r["data"], r["lr"], r["weight_decay"]) for r in records if r["kind"] == "trial" and r["trial"] == 5]
    assert sorted(last) == [("flowers5", 4e-3, 0.3), ("trashnet", 4e-3, 0.3)]


def test_a_method_can_be_compared_on_other_targets(folders, tmp_path, monkeypatch):
    asked = []

    def auto_targets(config, out, display):
        asked.append((Path(config.data).name, config.seed, out))
        return ("blocks.2.fc1",)

    monkeypatch.setattr(worker, "auto_targets", auto_targets)
    methods = ("kadaptation@blocks.0.q,blocks.0.v", "kadaptation@probe", "bitfit")
    document = run(grid_of(folders[:1], methods=methods), tmp_path).document
    assert [row["method"] for row in document["rows"]] == list(methods)
    rules, both = 2 * 32**2, 6 + 6
    assert [row["adapter"] for row in document["rows"][:2]] == [2 * rules + 2 * 32 * both + 192, rules + 32 * (24 + 6)]
    assert asked == [("flowers5", 0, tmp_path / "probes" / "flowers5-0")]
    with pytest.raises(UsageError, match="unknown method 'kadapt'; did you mean"):
        run(grid_of(folders[:1], methods=("kadapt@probe",)), tmp_path)
    with pytest.raises(UsageError, match="--targets: 'atn' matches nothing"):
        run(grid_of(folders[:1], methods=("lora@atn",)), tmp_path)


def test_test_best_reports_the_best_epoch_on_the_test_images(folders, tmp_path, monkeypatch):
    def fit(session, display):
        assert session.images.splits["val"] == session.images.splits["test"] != []
        session.history = [{"val_accuracy": a, "val_loss": 1.0, "time_s": 1.0, "kept": True} for a in (0.2, 0.9, 0.4)]

    monkeypatch.setattr(worker, "fit", fit)
    document = run(grid_of(folders[:1], methods=("bitfit",), select="test-best"), tmp_path).document
    assert document["rows"][0]["accuracy"] == 0.9
    assert document["select"] == "test-best"


def test_a_failed_trial_is_recorded_and_the_rest_goes_on(folders, tmp_path, monkeypatch):
    real = worker.fit

    def fit(session, display):
        if session.config.lr == 2e-2:
            raise DivergedError("the loss is not finite at step 1")
        real(session, display)

    monkeypatch.setattr(worker, "fit", fit)
    document = run(grid_of(folders[:1], methods=("bitfit",), search="coarse"), tmp_path).document
    assert [row["method"] for row in document["rows"]] == ["bitfit"]
    assert [(f["trial"], f["reason"]) for f in document["failures"]] == [(4, "the loss is not finite at step 1")]


def test_a_failure_is_final_for_all_workers_of_a_comparison_and_tried_again_by_the_next(folders, tmp_path, monkeypatch):
    """Also for a worker that started after it was recorded."""

    def fit(session, display):
        raise DivergedError("the loss is not finite at step 1")

    monkeypatch.setattr(worker, "fit", fit)
    grid = grid_of(folders[:1], methods=("bitfit",))
    with pytest.raises(CheckFailedError):
        run(grid, tmp_path)
    backbone = load_backbone(grid.base)
    study = open_study(tmp_path, None, grid.settings(backbone))
    late, later = (
        worker.Worker(grid, study, quiet(), backbone, tmp_path, before=before) for before in (0, len(study.records()))
    )
    assert [each._is_done(grid.cells()[0]) for each in (late, later)] == [True, False]


def test_a_cell_whose_runs_all_fail_has_no_accuracy(folders, tmp_path, monkeypatch):
    real = worker.fit

    def fit(session, display):
        if session.config.method == "bitfit":
            raise DivergedError("the loss is not finite at step 1")
        real(session, display)

    monkeypatch.setattr(worker, "fit", fit)
    document = run(grid_of(folders[:1], search="coarse"), tmp_path).document
    assert [row["method"] for row in document["rows"]] == ["linear"]
    assert document["failures"][-1]["reason"] == "every trial failed"
    assert document["failures"][-1]["trial"] is None


def test_test_best_works_on_kept_activations(folders, tmp_path):
    base = TrainConfig(shots=5, epochs=2, augment="none", targets=("blocks.5.*",))
    grid = Grid(data=folders[:1], methods=("bitfit",), seeds=(0,), base=base, select="test-best")
    assert run(grid, tmp_path).document["select"] == "test-best"


def test_a_final_run_that_failed_is_tried_again(folders, tmp_path, monkeypatch):
    def fit(session, display):
        raise DivergedError("no luck")

    grid = grid_of(folders[:1], methods=("bitfit",))
    with monkeypatch.context() as patch:
        patch.setattr(worker, "fit", fit)
        with pytest.raises(CheckFailedError, match="every run failed; the first: no luck"):
            run(grid, tmp_path)
    document = run(grid, tmp_path).document
    assert len(document["rows"]) == 1
    assert document["failures"] == []


def test_what_the_machine_could_not_do_is_tried_again(folders, tmp_path, monkeypatch):
    """A trial that failed for want of memory is done again by the next comparison; one that diverged is not."""
    real, tried = worker.fit, []

    def fit(session, display):
        tried.append(session.config.lr)
        if session.config.lr == 1e-3 and out_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if session.config.lr == 1e-1:
            raise DivergedError("the loss is not finite at step 1")
        real(session, display)

    monkeypatch.setattr(worker, "fit", fit)
    grid, out_of_memory = grid_of(folders[:1], methods=("bitfit",), search="coarse"), True
    failures = run(grid, tmp_path).document["failures"]
    reasons = ["out of memory; give a smaller --batch-size or --jobs", "the loss is not finite at step 1"]
    assert [f["reason"] for f in failures] == reasons
    tried.clear()
    out_of_memory = False
    study = tmp_path / "study.jsonl"
    lines = study.read_text().splitlines(keepends=True)
    study.write_text("".join(line for line in lines if '"final"' not in line))  # as when it was killed before it
    again = run(grid, tmp_path).document
    assert [f["reason"] for f in again["failures"]] == reasons[1:]
    assert 1e-3 in tried
    assert 1e-1 not in tried


@pytest.fixture
def many_photos(folders, tmp_path):
    """Three classes with a test folder and more training photos than a draw takes."""
    root = tmp_path / "many"
    for source in sorted(Path(folders[0]).iterdir()):
        for number, photo in enumerate(sorted(source.iterdir())):
            place = root / ("train" if number < 6 else "test") / source.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, place)
    return root


def drawn_by_one_seed(root, seed, others) -> Path:
    """A training photo that a seed draws and the others do not."""
    draws = {s: {x.path for x in open_images(str(root), shots=2, seed=s).splits["train"]} for s in (seed, *others)}
    return root / min(draws[seed].difference(*(draws[other] for other in others)))


def test_a_bad_image_that_a_later_seed_draws_fails_its_cells_alone(many_photos, tmp_path):
    drawn_by_one_seed(many_photos, 2, (0, 1)).write_bytes(b"no image")
    base = TrainConfig(shots=2, epochs=1, augment="none")
    grid = Grid(data=(str(many_photos),), methods=("linear",), seeds=(0, 1, 2), base=base)
    document = run(grid, tmp_path / "out").document
    assert [row["seed"] for row in document["rows"]] == [0, 1]
    (failure,) = document["failures"]
    assert (failure["seed"], failure["trial"]) == (2, None)
    assert "cannot be used" in failure["reason"]
    skipping = replace(grid, base=base.model_copy(update={"skip_bad": True}))
    document = run(skipping, tmp_path / "skipping").document
    assert len(document["rows"]) == 3
    assert any(note.startswith("many, seed 2: ") and "left out" in note for note in document["notes"])
    assert "left out" in (tmp_path / "skipping" / "comparison.html").read_text()


def test_images_that_only_a_later_seed_draws_are_held_against_the_study_too(many_photos, tmp_path):
    base = TrainConfig(shots=2, epochs=1, augment="none")
    grid = Grid(data=(str(many_photos),), methods=("linear",), seeds=(0, 2), base=base)
    run(grid, tmp_path / "out")
    photo = drawn_by_one_seed(many_photos, 2, (0,))
    photo.write_bytes(next(iter(sorted((many_photos / "test").rglob("*.jpg")))).read_bytes())
    with pytest.raises(UsageError, match="many is not what the study was made with"):
        run(replace(grid, methods=("linear", "bitfit")), tmp_path / "out")


def test_records_of_other_processes_are_not_this_ones_time(monkeypatch):
    said: list[str] = []
    display = quiet()
    monkeypatch.setattr(display, "say", said.append)
    fresh = [{"busy_s": 6.0, "pid": 1}, {"busy_s": 50.0, "pid": 2}]
    comparing._say_overhead(fresh, [1], 8.0, display)
    comparing._say_overhead(fresh[1:], [1], 8.0, display)
    assert said == ["25.0% of the time went into other things than training and measuring"]


def test_other_images_under_the_same_name_are_refused(folders, tmp_path):

    first, second = (tmp_path / name / "flowers" for name in ("a", "b"))
    for folder, source in ((first, folders[0]), (second, folders[0])):
        shutil.copytree(source, folder)
    next(iter(sorted(second.iterdir()))).joinpath("more.jpg").write_bytes(
        next(iter(sorted(Path(folders[1]).rglob("*.jpg")))).read_bytes()
    )
    run(grid_of((str(first),), methods=("linear",)), tmp_path / "out")
    with pytest.raises(UsageError, match="flowers is not what the study was made with"):
        run(grid_of((str(second),), methods=("linear",)), tmp_path / "out")


def test_validation_is_taken_from_the_shots_even_where_the_set_has_its_own(split_photos):
    grid = Grid(data=(str(split_photos),), methods=("linear",), seeds=(0,), base=TrainConfig(shots=5), search="coarse")
    images = worker.open_cell(grid, str(split_photos), 0)
    assert {split: len(samples) for split, samples in images.splits.items()} == {"train": 12, "val": 3, "test": 12}
    assert all(sample.path.startswith("train/") for sample in images.splits["val"])
    none = worker.open_cell(replace(grid, search="none"), str(split_photos), 0)
    assert (len(none.splits["train"]), len(none.splits["val"])) == (15, 0)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"base": TrainConfig(model="vit_basee", shots=5)}, ModelError, "unknown model"),
        ({"base": TrainConfig(targets=("nonsense",), shots=5)}, UsageError, "matches nothing"),
        ({"base": TrainConfig(head_init="text", shots=5)}, ModelError, "no CLIP image tower"),
        ({"methods": ("lora", "lorra")}, UsageError, "unknown method 'lorra'; did you mean lora"),
        ({"methods": ("lora", "lora")}, UsageError, "is there twice"),
        ({"data": ("nowhere",)}, DataError, "nowhere"),
        ({"data": ("mnist", "MNIST")}, UsageError, "--data: one of mnist, mnist is there twice"),
        ({"data": ("oxford-iit-pets",)}, DataError, "oxford-iiit-pets"),
        ({"base": TrainConfig(metric="roc_auc", shots=5)}, UsageError, "cannot have roc_auc"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(folders, tmp_path, changes, error, words):
    grid = grid_of(folders)
    with pytest.raises(error, match=words) as caught:
        run(Grid(**(vars(grid) | changes)), tmp_path / "out")
    assert isinstance(caught.value, KadaptError)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_comparison_goes_on_in_two_processes(folders, tmp_path):
    """Killed after its third record; two workers finish it; no trial is done twice."""
    command = [sys.executable, "-m", "kadapt_cli", "compare", "--data", folders[0], "--data", folders[1], "--out"]
    command += [str(tmp_path / "c"), "--method", "bitfit", "--method", "linear", "--seeds", "0", "--search", "coarse"]
    command += ["--search-epochs", "1", "--epochs", "1", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    study = tmp_path / "c" / "study.jsonl"
    while process.poll() is None and not (study.exists() and study.read_bytes().count(b"\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command, "--jobs", "2"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 4
    records = [json.loads(line) for line in study.read_text().splitlines()[1:]]
    keys = [(r["data"], r["method"], r["trial"]) for r in records]
    assert len(keys) == len(set(keys)) == 4 * 7  # six trials and the final run
