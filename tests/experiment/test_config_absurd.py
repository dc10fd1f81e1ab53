"""What no configuration should say: absurd numbers, files that are none, keys under other programs' names."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest
from commands import msfusion, refused

from msfusion.errors import ConfigError
from msfusion.experiment.comparison import Comparison
from msfusion.experiment.config import load_config

DIGITS = "9" * 5000
ABSURD = [
    ("participants.count", str(10**18)),
    ("rounds", str(10**9)),
    ("run.threads", "1000000"),
    ("run.workers", "1000000"),
    ("comparison.seeds", str(10**18)),
    ("training.local_epochs", str(10**18)),
    ("training.batch_size", str(10**18)),
    ("seed", DIGITS),
    ("seed", f"-{DIGITS}"),
    ("seed", "0x" + "f" * 5000),
    ("seed", str(2**63)),
    ("model.options.widths", f"[4, {DIGITS}]"),
    ("model.options.widths", f"[4, {2**64}]"),
    ("data.options", "{ a = { b = " + str(2**64) + " } }"),
    ("model.options.a", "[" * 100 + "]" * 100),
    ("model.options.a", "[" * 20_000 + "]" * 20_000),
    ("model.options.a", "{ a = " * 3000 + "1" + "}" * 3000),
    ("participants.ratio", "[" + "0.5, " * 20_000 + "]"),
    ("training.learning_rate", "inf"),
    ("data.alpha", "nan"),
    ("training.optimizer", "'" + "x" * 60_000 + "'"),
    ("network.profile", "x" * 60_000),
    ("x" * 60_000, "1"),
    ("training." + "x" * 60_000, "1"),
    ("a." * 20_000 + "b", "1"),
    ("data.options", "{ " + "a." * 20_000 + "b = 1 }"),
]


@pytest.mark.without_type_checks
@pytest.mark.parametrize(
    ("key", "value"), ABSURD, ids=[f"{key[:20]} {at}" for at, (key, _) in enumerate(ABSURD)]
)
@pytest.mark.parametrize("place", ["--set", "file"])
def test_absurd_values_are_refused_quickly_and_shortly(
    tmp_path: Path, key: str, value: str, place: str
) -> None:
    path = tmp_path / "absurd.toml"
    text = value if value[:1] in "-[{'0123456789in" else f"'{value}'"
    path.write_text(f"{key} = {text}\n")
    gc.disable()  # looking through all that an old worker holds takes longer than what is measured
    try:
        begin = time.process_time()
        with pytest.raises(ConfigError) as error:
            load_config(path) if place == "file" else load_config(None, [f"{key}={value}"])
        assert time.process_time() - begin < 1
    finally:
        gc.enable()
    told = str(error.value)
    assert len(told) < 600
    assert told.isprintable()
    assert told.startswith("--set" if place == "--set" else str(path))


def test_numbers_of_64_bits_and_some_levels_are_not_absurd() -> None:
    config = load_config(None, [f"seed={2**63 - 1}", "model.options.a={b={c={d=[[1]]}}}", "rounds=100000"])
    assert (config.seed, config.rounds) == (2**63 - 1, 100_000)


def test_a_mark_before_the_text_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbfrounds = 7\r\n")
    assert load_config(path).rounds == 7
    (tmp_path / "above.toml").write_text('extends = "marked.toml"\nseed = 3\n', encoding="utf-8-sig")
    assert load_config(tmp_path / "above.toml").rounds == 7


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n\n", "is empty"),
        (b"# " + b"x" * 2**21, "shorter than 1 MiB"),
        ("rounds = 3".encode("utf-16"), "not UTF-8"),
        ("# f\xfcr\nrounds = 3".encode("latin-1"), "not UTF-8"),
        (b"\x00" * 10, "not valid TOML"),
    ],
    ids=range(6),
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "odd.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", ".", "n" * 300, "a\0b"], ids=ascii)
def test_what_is_no_file(here: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Path(path))


def test_a_pipe_is_as_good_as_a_file(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b"rounds = 7\n")
    os.close(theirs)
    assert load_config(Path(f"/dev/fd/{ours}")).rounds == 7
    os.close(ours)


def test_files_that_extend_each_other_without_end(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.toml").write_text('extends = "below/../b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "below/../a.toml"\n')
    with pytest.raises(ConfigError, match="not this one again"):
        load_config(tmp_path / "a.toml")
    for number in range(100):
        (tmp_path / f"{number}.toml").write_text(f'extends = "{number + 1}.toml"\n')
    with pytest.raises(ConfigError, match="files extend each other"):
        load_config(tmp_path / "0.toml")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lr", "training.learning_rate"),
        ("lr", "training.learning_rate"),
        ("training.epochs", "training.local_epochs"),
        ("epochs", "training.local_epochs"),
        ("training.batch", "training.batch_size"),
        ("training.batch-size", "training.batch_size"),
        ("training.batchSize", "training.batch_size"),
        ("batch_size", "training.batch_size"),
        ("training.wd", "training.weight_decay"),
        ("training.scheduler", "training.learning_rate_schedule"),
        ("training.max_grad_norm", "training.clip_norm"),
        ("clients", "participants"),
        ("clients.count", "participants"),
        ("num_clients", "participants.count"),
        ("participants.num", None),
        ("num_rounds", "rounds"),
        ("training.rounds", "rounds"),
        ("alpha", "data.alpha"),
        ("data.dirichlet_alpha", "data.alpha"),
        ("dataset", "data.source"),
        ("data.dataset", "data.source"),
        ("algorithm", "method.name"),
        ("run.num_workers", "run.workers"),
        ("device", "run.device"),
        ("data.seq_len", "data.length"),
        ("participants.fraction_fit", "participants.fraction"),
        ("Rounds", "rounds"),
        ("evaluation.eval_every", "evaluation.every"),
    ],
)
def test_keys_under_other_names_are_recognised(key: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"{key}=1"])
    expected = "known here" if meant is None else f"did you mean '{meant}'?"
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "command", ["", "train", "plan", "inspect", "compare", "export", "certificates", "serve", "join"]
)
def test_help_keeps_its_brackets(command: str) -> None:
    shown = msfusion(*command.split(), "--help").stdout
    expected = {
        "train": "[OPTIONS] [CONFIG]",
        "plan": "[OPTIONS] [CONFIG]",
        "compare": "CONFIG's [comparison].",
        "serve": "[OPTIONS] CONFIG",
        "join": "[OPTIONS] CONFIG",
    }.get(command, "[OPTIONS]")
    assert expected in " ".join(shown.split()).replace(
        "{CONFIG}", "CONFIG"
    )  # as newer versions of typer have it
    assert "..." not in shown.replace("[ARGS]...", "")


def test_variants_with_endless_names_have_directories(tmp_path: Path) -> None:
    from msfusion.experiment.comparison import plan_runs

    names = {"a" * 1000: {"rounds": 1}, "a" * 1001: {"rounds": 2}, "short one": {"rounds": 3}}
    runs = plan_runs(load_config(None), Comparison(["small"], seeds=1, variants=names))
    directories = [run.name for run in runs]
    assert len(set(directories)) == 3
    assert directories[2] == "small-short-one-rounds3-seed0"
    for name in directories:
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="almost the same name"):
        Comparison(["small"], variants={"A" * 1000: {}, "a" * 1000: {}})


@pytest.mark.parametrize("seeds", ["0", str(10**18)])
def test_seeds_without_end(here: Path, seeds: str) -> None:
    (here / "c.toml").write_text("rounds = 1\n")
    refused(
        msfusion("compare", "c.toml", "--methods", "small", "--seeds", seeds, "--out", "o"), "at most 1000"
    )


def test_a_model_that_no_memory_holds(here: Path) -> None:
    refused(
        msfusion("plan", "--set", "model.options.widths=[1000000000000, 4]"), "the model would have more than"
    )
