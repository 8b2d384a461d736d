"""Invariants over generated input: the configuration's round trip, the splits, and what a target names."""

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kadapt_cli.adapters import select
from kadapt_cli.config import MAX_NAME, TrainConfig, read_toml, resolve, to_toml
from kadapt_cli.data import FOLDERS, Sample, _divide
from kadapt_cli.errors import DataError, UsageError
from kadapt_cli.surgery import Segment

pytestmark = pytest.mark.faults
ROW = "properties (hypothesis)"
EXAMPLES, SAMPLE = 2_000, 100


def examples(body: Any, quick: bool, tally: Any, **strategies: Any) -> None:
    """Run `body` on generated input, always the same, and count how often."""
    count = 0

    def counted(**values: Any) -> None:
        nonlocal count
        count += 1
        body(**values)

    wanted = SAMPLE if quick else EXAMPLES
    how = settings(
        max_examples=wanted, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    how(given(**strategies)(counted))()
    assert count >= wanted
    tally(ROW, wanted)


# --- configuration ---

# All of Unicode but surrogates, which no file can hold, and NUL, which no name can; what TOML must escape comes often.
LETTERS = st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    st.sampled_from("\"\\'\n\r\t\b\f\x1b\x7f\x85\u2028\ufeff#=[]{}😀\U0010ffff"),
)
NAMES = st.text(LETTERS, min_size=1, max_size=40)


def _values(name: str) -> st.SearchStrategy[Any]:
    """Every kind of value that a field may have."""
    field = TrainConfig.model_fields[name]
    bounds = {key: getattr(b, key) for b in field.metadata for key in ("ge", "gt", "le", "lt") if hasattr(b, key)}
    text = str(field.annotation)
    if "Literal" in text:
        literal = next((a for a in getattr(field.annotation, "__args__", ()) if hasattr(a, "__args__")), None)
        found = st.sampled_from((literal or field.annotation).__args__)
    elif "tuple" in text:
        found = st.lists(NAMES, min_size=1, max_size=6).map(tuple)
    elif "bool" in text:
        found = st.booleans()
    elif "int" in text:
        found = st.integers(bounds.get("ge", 0), bounds.get("le", bounds.get("lt", 0) - 1))
    elif "float" in text:
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("lt")
        found = st.floats(
            low, high, exclude_min="gt" in bounds, exclude_max=high is not None, allow_nan=False, allow_infinity=False
        )
    else:
        found = st.one_of(NAMES, st.just("é" * MAX_NAME))
    return st.one_of(st.none(), found) if "None" in text else found


def test_a_configuration_comes_back_from_its_file(quick, tally):
    """TrainConfig -> to_toml -> a file -> resolve: equal, whatever is in its strings."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"

        def back(values: dict[str, Any]) -> None:
            config = resolve(values)
            file.write_bytes(to_toml(config).encode())
            assert resolve({}, file) == config
            assert resolve(read_toml(file)) == config
            assert to_toml(resolve({}, file)) == to_toml(config)
            for name, value in values.items():
                assert getattr(config, name) == (TrainConfig.model_fields[name].default if value is None else value)

        fields = {name: _values(name) for name in TrainConfig.model_fields}
        examples(back, quick, tally, values=st.fixed_dictionaries({}, optional=fields))


# --- splits ---


@st.composite
def pools(draw: st.DrawFn) -> dict[str, list[Sample]]:
    """Images of two to six classes in train/, and sometimes in val/ and test/; awkward names, no two alike."""
    classes = draw(st.integers(2, 6))
    found = {}
    letters = st.characters(exclude_characters="/\0", exclude_categories=["Cs"])
    no_utf8 = st.characters(
        min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"]
    )  # bytes, as Python reads them
    names = st.text(st.one_of(letters, no_utf8), min_size=1, max_size=8)
    for split in draw(st.sampled_from([("train",), ("train", "val"), ("train", "test"), tuple(FOLDERS)])):
        counts = draw(st.lists(st.integers(1, 15), min_size=classes, max_size=classes))
        stems = draw(st.lists(names, min_size=3, max_size=3, unique=True))
        samples = [Sample(f"{split}/{c}/{stems[i % 3]}{i}", c) for c, n in enumerate(counts) for i in range(n)]
        found[split] = draw(st.permutations(samples)) if len(samples) < 12 else samples
    return found


def _of(splits: dict[str, list[Sample]], label: int) -> dict[str, list[Sample]]:
    return {split: [sample for sample in samples if sample.label == label] for split, samples in splits.items()}


def test_splits_are_stratified_disjoint_and_order_free(quick, tally):
    """What is in a split depends on the seed and the paths of a class alone, and every class gets its share."""

    def hold(given: dict[str, list[Sample]], shots: int | None, seed: int, val: str, shuffle: int) -> None:
        classes = tuple("abcdef"[: 1 + max(sample.label for sample in given["train"])])
        if shots == 1 and val == "auto" and "val" not in given:
            shots = 2  # open_images refuses one shot with validation drawn from it
        counts = Counter(sample.label for sample in given["train"])
        least = shots or 1 + (val == "auto" and "val" not in given) + ("test" not in given)
        if min(counts.values()) < least:
            with pytest.raises(DataError):
                _divide(given, classes, shots, seed, val, "here")
            return
        if val == "none":
            given = {split: samples for split, samples in given.items() if split != "val"}
        splits = _divide(given, classes, shots, seed, val, "here")
        placed = [sample for samples in splits.values() for sample in samples]
        assert len(set(placed)) == len(placed)  # disjoint
        assert set(placed) <= {sample for samples in given.values() for sample in samples}
        if shots is None or "test" not in given:
            assert len(placed) == sum(map(len, given.values()))  # covers
        assert all(samples == sorted(samples, key=lambda s: s.path) for samples in splits.values())
        for split in ("val", "test"):
            if split in given:
                assert set(splits[split]) == set(given[split])

        for label, n in counts.items():  # stratified: the numbers of a class follow from its size alone
            own = {split: len(samples) for split, samples in _of(splits, label).items()}
            tested = 0 if "test" in given else max(1, round(0.2 * n)) if shots is None else n - shots
            drawn = shots if shots is not None else n - tested
            kept = max(1, round(0.2 * drawn)) if val == "auto" and "val" not in given else 0
            assert own["train"] == drawn - kept
            assert own["train"] >= 1
            if "val" not in given:
                assert own["val"] == kept
            if "test" not in given:
                assert own["test"] == tested

        mixed = {split: random.Random(shuffle).sample(samples, len(samples)) for split, samples in given.items()}
        assert _divide(mixed, classes, shots, seed, val, "here") == splits  # order-free
        fewer = {s: [x for x in xs if x.label != 0 or x in given[s][:1]] for s, xs in given.items()}
        fewer["train"] = [x for x in given["train"] if x.label != 0] + [Sample(f"new/{i}", 0) for i in range(20)]
        other = _divide(fewer, classes, shots, seed, val, "here")
        for label in range(1, len(classes)):  # another class's images change nothing
            assert _of(other, label) == _of(splits, label)

    examples(
        hold,
        quick,
        tally,
        given=pools(),
        shots=st.one_of(st.none(), st.integers(1, 8)),
        seed=st.integers(0, 2**32 - 1),
        val=st.sampled_from(["auto", "none"]),
        shuffle=st.integers(0, 99),
    )


# --- targets ---


def _glob(pattern: str, text: str) -> bool:
    """Whether a glob matches a text: by its definition, character by character."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(_glob(pattern[1:], text[i:]) for i in range(len(text) + 1))
    if pattern[0] == "[":
        end = pattern.find("]", 2 + pattern.startswith("[!"))
        if end > 0:
            inside, negated = pattern[1:end], pattern[1] == "!"
            return (
                bool(text) and (_in_set(inside[negated:], text[0]) != negated) and _glob(pattern[end + 1 :], text[1:])
            )
    return bool(text) and (pattern[0] in ("?", text[0])) and _glob(pattern[1:], text[1:])


def _in_set(members: str, letter: str) -> bool:
    """Whether a letter is among those between brackets, where a-c is a, b and c."""
    while members:
        if len(members) >= 3 and members[1] == "-":
            if members[0] <= letter <= members[2]:
                return True
            members = members[3:]
        else:
            if members[0] == letter:
                return True
            members = members[1:]
    return False


PARTS = st.one_of(
    st.sampled_from(["q", "k", "v", "proj", "fc1", "fc2", "attn", "mlp", "blocks", "blocks.", "0", "1", "10", "11"]),
    st.sampled_from(
        ["*", "?", ".", "[0-9]", "[!0]", "[qk]", "[!a-f]", "f*", "b*s", "(", "+", "^", "$", "|", "[", "\\"]
    ),
    st.characters(max_codepoint=0x2FF),
)
PATTERNS = st.lists(PARTS, min_size=1, max_size=4).map("".join)
WHOLE = st.sampled_from(["blocks.1", "blocks.1*", "blocks.[0-2].attn", "blocks.3.*", "mlp", "fc?", "*", "*.q", "attn"])


@st.composite
def models(draw: st.DrawFn) -> list[Segment]:
    """The segments of a model of up to twelve blocks, some of whose blocks lack some layers."""
    names = ("q", "k", "v", "proj", "fc1", "fc2")
    blocks = draw(st.integers(1, 12))
    lacking = draw(st.sets(st.tuples(st.integers(0, 11), st.sampled_from(names[3:])), max_size=6))
    return [
        Segment(block, name, f"blocks.{block}.x", 0, 4, 4, None, 0)
        for block in range(blocks)
        for name in names
        if (block, name) not in lacking
    ]


def test_a_target_names_what_a_slow_matcher_finds(quick, tally):
    """`select` finds what the definition says: segments first, else groups and blocks, in the order of the model."""

    def same(available: list[Segment], patterns: list[str]) -> None:
        wanted: set[int] = set()
        for pattern in patterns:
            names = [(s.name, f"blocks.{s.block}.{s.name}") for s in available]
            groups = ["attn" if s.name in ("q", "k", "v", "proj") else "mlp" for s in available]
            wider = [(g, f"blocks.{s.block}.{g}", f"blocks.{s.block}") for s, g in zip(available, groups, strict=True)]
            hits = [i for i, own in enumerate(names) if any(_glob(pattern, name) for name in own)]
            hits = hits or [i for i, own in enumerate(wider) if any(_glob(pattern, name) for name in own)]
            if not hits:
                with pytest.raises(UsageError) as raised:
                    select(available, patterns)
                assert pattern in str(raised.value)
                return
            wanted.update(hits)
        assert select(available, patterns) == [available[i] for i in sorted(wanted)]

    lists = st.lists(st.one_of(WHOLE, PATTERNS), min_size=1, max_size=3)
    examples(same, quick, tally, available=models(), patterns=lists)
