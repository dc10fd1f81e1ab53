"""Configurations: the default, overrides, and every mistake in one sentence with key, file and remedy."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.budgets import Budget
from msfusion.data.load import load_data
from msfusion.errors import ConfigError
from msfusion.experiment.comparison import Comparison, plan_runs
from msfusion.experiment.config import Config, default_toml, load_config
from msfusion.experiment.config.errors import known_keys, sections_in
from msfusion.experiment.config.keys import flattened, parse_override
from msfusion.experiment.config.sections import SplitSection
from msfusion.methods.split.method import SplitSettings

MISTAKES = [
    ("participants.ratio=0", "--set: participants.ratio = 0 should be a number greater than 0 and at most 1"),
    ("participants.ratio=1.5", "participants.ratio = 1.5 should be a number greater than 0 and at most 1"),
    ("participants.ratio=-0.5", "participants.ratio = -0.5 should be a number greater than 0 and at most 1"),
    ("participants.ratio=nan", "participants.ratio = NaN should be a number greater than 0 and at most 1"),
    ("participants.ratio=true", "participants.ratio = true should be a number greater than 0 and at most 1"),
    ("participants.ratio=1/4", 'participants.ratio = "1/4" should be a number greater than 0 and at most 1'),
    (
        "participants.ratio=[0.5, 0.0]",
        "should be a number greater than 0 and at most 1, or a list of such numbers",
    ),
    ("participants.ratio=[0.5, 0.25]", "should be one number, or one for each of the 10 participants, not 2"),
    ("participants.ratio=[]", "should be one number, or one for each of the 10 participants, not 0"),
    ("participants.count=0", "participants.count = 0 should be at least 1"),
    ("participants.fraction=0", "participants.fraction = 0 should be above 0"),
    ("participants.fraction=1.5", "participants.fraction = 1.5 should be at most 1"),
    ("participants.ratoi=1", "there is no key 'participants.ratoi' (did you mean 'participants.ratio'?)"),
    ("ratio=1", "there is no key 'ratio' (did you mean 'participants.ratio'?)"),
    ("round=1", "there is no key 'round' (did you mean 'rounds'?)"),
    ("participant.count=1", "there is no key 'participant' (did you mean 'participants'?)"),
    ("colour=1", "there is no key 'colour' (known here: seed, rounds, data, model"),
    ("rounds=many", 'rounds = "many" should be a valid integer'),
    ("rounds=2.5", "rounds = 2.5 should be a valid integer"),
    ("rounds=0", "rounds = 0 should be at least 1"),
    ("seed=-1", "seed = -1 should be at least 0"),
    ("data=3", "data = 3 should be a table (a [data] section)"),
    ("data.source.name=x", '--set data.source.name: data.source is "digits", not a table'),
    ("evaluation.own_labels=true", "evaluation.own_labels is for method.name = 'fedgrow', not 'msfusion'"),
    ("data.alpha=inf", "data.alpha = Infinity should be a finite number"),
    ("data.length=0", "--set: data.length = 0 should be at least 1"),
    ("model.options=3", "model.options = 3 should be a table"),
    ("method.name=fedrolx", "method.name = \"fedrolx\" should be 'msfusion', 'fedrolex'"),
    ("method.overlap.start=2", "method.overlap.start = 2 should be at most 1"),
    ("method.overlap.stat=1", "no key 'method.overlap.stat' (did you mean 'method.overlap.start'?)"),
    ("method.overlap.end=0.5", "method.overlap lacks the key 'method.overlap.start'"),
    ("method.overlap=0.5", "method.overlap = 0.5 should be a table (a [method.overlap] section)"),
    (
        "participants.budget={memory='64 XB'}",
        'participants.budget.memory = "64 XB" should be a number of bytes',
    ),
    ("participants.budget={memry=3}", "(did you mean 'participants.budget.memory'?)"),
    (
        "participants.budget=[{memory=9}, {memory='9 k'}]",
        '--set: participants.budget[1].memory = "9 k" should be a number of bytes',
    ),
    ("participants.budget=[{memory=9}, 9]", "--set: participants.budget[1] = 9 should be a table."),
    (
        "participants.budget=[{memry=9}]",
        "'participants.budget[0].memry' (did you mean 'participants.budget.m",
    ),
    ("network.machines=[{gigaflops=-1}]", "--set: network.machines[0].gigaflops = -1 should be above 0"),
    ("comparison.methods=['small', 3]", "comparison.methods[1] = 3 should be a valid string"),
    ("training=[3]", "--set: training = [3] should be a table (a [training] section)"),
    (
        "participants.budget=[{memory=9}]",
        "should be one table, or one for each of the 10 participants, not 1",
    ),
    ("method.contrastive_weight=-1", "method.contrastive_weight = -1 should be at least 0"),
    ("method.contrastive_weight=inf", "method.contrastive_weight = Infinity should be a finite number"),
    ("method.contrastive_weight=yes", 'method.contrastive_weight = "yes" should be a valid number'),
    ("method.contrastive_temperature=0", "method.contrastive_temperature = 0 should be above 0"),
    ("method.contrastive_every=0", "method.contrastive_every = 0 should be at least 1"),
    ("method.contrastive_every=1.5", "method.contrastive_every = 1.5 should be a valid integer"),
    ("method.contrastive=1", "there is no key 'method.contrastive' (did you mean 'method.contrastive_"),
    ("method.codec=dead_zoe", "method.codec: there is no codec 'dead_zoe'"),
    ("method.codec={codec='dead_zone',step=0.0}", "step = 0.0: the step must be above 0"),
    ("method.codec_down=3", "method.codec_down = 3 should be"),
    ("training.optimizer=7", "training.optimizer = 7 should be 'sgd'"),
    ("training.batch_size=0", "--set: training.batch_size = 0 should be at least 1"),
    ("training.learning_rate=nan", "training.learning_rate = NaN should be a finite number"),
    ("training.learning_rate=-1", "training.learning_rate = -1 should be above 0"),
    ("run.workers=true", "run.workers = true should be a valid integer"),
    ("no equals sign", "--set 'no equals sign' should have the form key=value"),
    ("=3", "--set '=3' should have the form key=value"),
    ("a..b=3", "--set 'a..b=3' should have the form key=value"),
]


def one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith(".") and not message.endswith("..")


@pytest.mark.parametrize(("override", "expected"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_mistakes_are_told_in_one_sentence(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert expected in str(error.value)
    assert one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds = ", "mine.toml is not valid TOML: "),
        ("rounds = 1\nrounds = 2", "mine.toml is not valid TOML: "),
        ("rounds = 0", "mine.toml: rounds = 0 should be at least 1"),
        (
            "[participants]\ncount = 3\nratio = [1, 0.5]",
            "mine.toml: participants.ratio = [1, 0.5] should be one number",
        ),
        (
            "[training]\nlearning_rat = 1",
            "there is no key 'training.learning_rat' (did you mean 'training.learning_rate'?)",
        ),
        ("[data]\nlength = 0", "mine.toml: data.length = 0 should be at least 1."),
        ("rounds = 'ÿ", "mine.toml is not valid TOML: "),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert expected in str(error.value)
    assert one_sentence(str(error.value))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no configuration file .*absent.toml\."):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory\."):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot be read: it is not UTF-8 text\."):
        load_config(tmp_path / "binary.toml")


def test_the_default_is_what_the_issue_asks_for() -> None:
    config = load_config(None)
    assert config.data_spec.source == "digits"
    assert config.participants.ratios == (0.25,) * 10
    assert (
        load_data(config.data_spec).label_counts().max() > 36
    )  # of 144 on average: an even share has 14 of each
    assert config.method.name == "msfusion"
    known = set(known_keys(Config))
    assert set(flattened(tomllib.loads(default_toml()))) <= known


WRITTEN_BEFORE = sorted(Path(__file__).with_name("written_before").glob("*.toml"))


@pytest.mark.parametrize("path", WRITTEN_BEFORE, ids=lambda path: path.stem)
def test_a_configuration_that_an_older_version_wrote_is_still_the_same(path: Path) -> None:
    fingerprint = path.read_text().splitlines()[0].removeprefix("# ")
    config = load_config(path)
    assert config.fingerprint() == fingerprint
    added = {"data.normalise_targets"}  # since, and without a meaning for these runs
    assert set(flattened(tomllib.loads(path.read_text()))) == set(flattened(config.to_table())) - added


def test_a_profile_of_a_codec_by_its_former_name_is_the_same() -> None:
    split = ["method.name=split", "split.at=layers.3", "run.workers=1"]
    before = ["split.activations=small", "split.gradients={codec='scaled', inner='small'}"]
    now = ["split.activations=compact", "split.gradients={codec='scaled', inner='compact'}"]
    old, new = load_config(None, [*split, *before]), load_config(None, [*split, *now])
    assert old.split == new.split
    assert old.difference(new) is None
    assert old.fingerprint() == new.fingerprint()


def test_every_key_has_a_meaning_in_one_line() -> None:
    for key in known_keys(Config):
        described = described_key(key)
        assert described
        assert "\n" not in described


def described_key(key: str) -> str | None:
    """What the schema says of a key: every section that may hold it says the same."""
    sections = [Config]
    *parents, last = key.split(".")
    for parent in parents:
        sections = [
            inner for section in sections for inner in sections_in(section.model_fields[parent].annotation)
        ]
    return next(
        section.model_fields[last].description for section in sections if last in section.model_fields
    )


def test_defaults_of_a_split_are_those_of_the_library() -> None:
    assert SplitSection(at="layers.3").settings == SplitSettings("layers.3")


def test_specifications_get_what_is_set_elsewhere() -> None:
    config = load_config(None, ["seed=7", "participants.count=3", "rounds=5"])
    assert (config.data_spec.seed, config.data_spec.participants, config.model_spec.seed) == (7, 3, 7)
    assert config.training_settings.rounds == 5


def test_the_resolved_configuration_is_read_back_equal(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "participants.count=2",
            "participants.ratio=[0.5, 1]",
            "model.options.widths=[4, 8]",
            "training.clip_norm=1",
        ],
    )
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    again = load_config(path)
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert again.difference(config) is None


def test_only_what_changes_results_makes_a_difference() -> None:
    config = load_config(None)
    same = load_config(None, ["run.workers=7", "run.checkpoint_every=3"])
    other = load_config(None, ["rounds=7"])
    assert config.fingerprint() == same.fingerprint()
    assert config.difference(same) is None
    assert config.fingerprint() != other.fingerprint()
    assert config.difference(other) == f"rounds is {config.rounds}, not 7"
    clipped = load_config(None, ["training.clip_norm=1.0"])
    assert config.difference(clipped) == "training.clip_norm is not set, not 1.0"
    assert clipped.difference(config) == "training.clip_norm is 1.0, not left out"


def test_a_table_for_all_differs_from_a_list_of_one_for_each() -> None:
    one = load_config(None, ["participants.count=2", "participants.budget={memory=5}"])
    each = load_config(None, ["participants.count=2", "participants.budget=[{memory=5}, {memory=6}]"])
    lists = 'participants.budget is [{"memory": 5}, {"memory": 6}], not given as participants.budget.memory'
    assert each.difference(one) == lists
    assert one.difference(each) == "participants.budget.memory is 5, not given as participants.budget"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=3", ("a.b", 3)),
        ("a = 3.5", ("a", 3.5)),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=true", ("a", True)),
        ("a=../shared/data", ("a", "../shared/data")),
        ("a='3'", ("a", "3")),
        ("a=", ("a", "")),
        ("a=b=c", ("a", "b=c")),
        ("a=1\nb=2", ("a", "1\nb=2")),
        ("a={x = 1}", ("a", {"x": 1})),
    ],
)
def test_overrides_are_toml_values_or_text(override: str, expected: tuple[str, Any]) -> None:
    assert parse_override(override) == expected


@pytest.mark.release
@settings(max_examples=50)
@given(st.text(max_size=30), st.sampled_from(known_keys(Config)))
def test_no_override_ends_in_anything_but_a_configuration_or_a_sentence(value: str, key: str) -> None:
    with suppress(ConfigError):
        load_config(None, [f"{key}={value}"])


def test_budgets_are_numbers_or_sizes_with_a_unit() -> None:
    config = load_config(
        None, ["participants.count=2", "participants.budget=[{memory='1.5 MB'}, {bytes_per_round=7}]"]
    )
    assert config.participants.budgets == (Budget(memory=1_500_000), Budget(bytes_per_round=7))
    for text, size in (
        ("2 KiB", 2048),
        ("1GiB", 2**30),
        ("3 kB", 3000),
        ("9 B", 9),
        ("64000", 64_000),
        (f"1{'0' * 400} B", 10**400),
    ):
        each = load_config(None, [f"participants.budget={{memory='{text}'}}"]).participants.budgets
        assert each == (Budget(memory=size),) * 10


def test_changing_some_keys() -> None:
    config = load_config(None).changed({"method.name": "fedavg", "participants.ratio": 1.0})
    assert config.method.name == "fedavg"
    assert config.participants.ratios == (1.0,) * 10
    with pytest.raises(ConfigError, match=r"participants.ratio = 2 should be"):
        config.changed({"participants.ratio": 2})


def test_another_model_does_not_inherit_options(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[model]\nname = "convnet"\noptions = { widths = [8] }\n')
    (tmp_path / "other.toml").write_text(
        'extends = "base.toml"\n[model]\nname = "resnet"\noptions = { blocks = 2 }\n'
    )
    (tmp_path / "same.toml").write_text('extends = "base.toml"\n[model]\noptions = { norm = "none" }\n')
    assert load_config(tmp_path / "other.toml").model_spec.options == {"blocks": 2}
    assert load_config(tmp_path / "same.toml").model_spec.options == {"widths": [8], "norm": "none"}


@pytest.mark.parametrize("codec", ['"compact"', '{ codec = "dead_zone", step = 1.4 }'])
def test_a_codec_leaves_the_other_keys_of_its_table_as_they_are(tmp_path: Path, codec: str) -> None:
    """In a file that extends another, and in a variant of a comparison."""
    (tmp_path / "base.toml").write_text(
        '[method]\nname = "feddropout"\ncodec = { codec = "top_k", ratio = 0.9 }\nweighting = "uniform"\n'
    )
    (tmp_path / "above.toml").write_text(
        f'extends = "base.toml"\n[method]\ncodec = {codec}\n[comparison]\nmethods = ["feddropout"]\nseeds = 1\n'
        f"[comparison.variants]\nother = {{ method.codec_down = {codec} }}\n"
    )
    config = load_config(tmp_path / "above.toml")
    (run,) = plan_runs(config, Comparison.of(config))
    expected = tomllib.loads(f"codec = {codec}")["codec"]
    for method in (config.method, run.config.method):
        assert (method.name, method.weighting, method.codec) == ("feddropout", "uniform", expected)
    assert (config.method.codec_down, run.config.method.codec_down) == (None, expected)
    keys = flattened(config.to_table())
    assert (keys["method.name"], keys["method.codec"]) == ("feddropout", expected)
