"""What may be wrong with examples: pure checks, each a finding with its count and a few places to look at."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from trainables.answers import LABEL_LENGTH, are_labels, folded, json_object, mostly
from trainables.data.formats import Example, WrongRow
from trainables.spec import DataSpec

Level = Literal["error", "warning", "info"]

FEW = 500
"""Distinct examples below which a fine-tuned model is seldom worth its trials."""

_SHOWN, _RANGES = 5, 20
_RARE = 0.1
"""A class is rare where it has less than this share of the most common one."""

_SURE, _LETTERS = 0.95, 30
"""A language counts where the identifier is so sure of it, of texts with at least so many letters."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about the data. An ``error`` keeps a sweep from starting."""

    check: str
    level: Level
    count: int
    message: str
    examples: tuple[str, ...] = ()
    """Places, with what stands there: the first few."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def wrong_rows(rows: Sequence[WrongRow], dropped: bool) -> Iterator[Finding]:
    """By what is wrong with them, every line named."""
    words = {
        "broken_row": "rows are no JSON objects",
        "missing_field": "rows lack a field",
        "empty_text": "rows have an empty text",
        "wrong_value": "rows have a value that their format does not take",
    }
    for fault, message in words.items():
        bad = [row for row in rows if row.fault == fault]
        lines = {name: _ranges([row.line for row in bad if row.source == name]) for name in {row.source for row in bad}}
        places = [f"{row.source}:{row.line}: {row.rule}" for row in bad]
        if places:
            where = "; ".join(f"{name} {numbers}" for name, numbers in sorted(lines.items()))
            mend = "left out" if dropped else "mend them, or set data.wrong_rows to drop"
            yield _finding(fault, "warning" if dropped else "error", places, f"{message} ({where}); {mend}")


def personal_data(places: Sequence[tuple[str, dict[str, int]]], values: Mapping[str, int], action: str) -> Finding:
    """That there is some, of which kind and where; never what it is."""
    kinds = ", ".join(f"{count:,} {entity}" for entity, count in values.items())
    done = {"redact": "redacted", "reject": "left out"}.get(action)
    mend = done or "set data.personal_data.action to redact or reject"
    shown = [f"{place}: {', '.join(f'{count} {entity}' for entity, count in found.items())}" for place, found in places]
    return _finding("personal_data", "info" if done else "warning", shown, f"examples have {kinds}; {mend}")


def duplicates(account: Mapping[str, Any]) -> Iterator[Finding]:
    """Examples that repeat another one: left out, so that no test example has a twin in training."""
    told = [f"{pair['removed']} repeats {pair['kept']} ({pair['similarity']:.0%})" for pair in account["pairs"]]
    if count := account["exact"] + account["near"]:
        message = f"examples repeat another one ({account['exact']:,} exactly, {account['near']:,} nearly); left out"
        yield Finding("duplicate", "info", count, message, tuple(told[:_SHOWN]))
    if count := account["of_held_out"]:
        yield Finding("held_out_twin", "warning", count, "examples repeat held-out ones (general or a suite); left out")


def too_small_to_split(examples: int, evals: int, tests: int, spec: DataSpec) -> Finding:
    return Finding(
        "too_small_to_split",
        "error",
        examples,
        f"distinct examples are too few to split: they give {evals} for eval (eval_size {spec.eval_size:g}) and "
        f"{tests} for test (test_size {spec.test_size:g}), and each needs at least 1; add examples or raise the shares",
    )


def lengths(cut: Sequence[str], untrained: Sequence[str], max_length: int) -> Iterator[Finding]:
    """Answers that the context does not hold to their end, or of which it holds nothing.

    transformers shifts labels by one, so the first token of an example is never learned.
    """
    if untrained:
        message = (
            f"examples have no trained token left: an answer must begin within data.max_length={max_length} tokens and "
            "be the assistant's; raise max_length or mend the rows"
        )
        yield _finding("no_trained_token", "error", untrained, message)
    if cut:
        yield _finding(
            "over_long", "warning", cut, f"examples are longer than data.max_length={max_length} and were cut"
        )


def check(examples: Sequence[Example]) -> Iterator[Finding]:
    """All checks that need the texts alone."""
    yield from contradictions(examples)
    yield from languages(examples)
    for name, group in _by(examples, lambda example: example.source).items():
        answered = [example for example in group if example.answer is not None]
        yield from truncated(name, answered)
        for field, values in _labels(answered).items():
            yield from casing(f"{name}: {field}", values)
            yield from balance(f"{name}: {field}", values)


def contradictions(examples: Iterable[Example]) -> Iterator[Finding]:
    """The same input, answered in different ways; case and white space do not count."""
    asked = _by((example for example in examples if example.answer is not None), lambda one: folded(one.prompt))
    places = []
    for group in asked.values():
        answers = {folded(example.answer or ""): example for example in group}
        if len(answers) > 1:
            places.append(", ".join(f"{one.place} {_short(one.answer or '')!r}" for one in list(answers.values())[:3]))
    if places:
        yield _finding("contradiction", "warning", places, "inputs have contradictory answers")


def truncated(name: str, examples: Sequence[Example]) -> Iterator[Finding]:
    """Answers that stop early: broken JSON where the others are JSON, an open code fence, no mark at the end."""
    is_json = [json_object(example.answer or "") is not None for example in examples]
    ends = [_ends_well(example.answer or "") for example in examples]
    mostly_json, mostly_ended = mostly(is_json), mostly(ends)
    places = [
        f"{example.place}: {_tail(example.answer or '')!r}"
        for example, parses, ended in zip(examples, is_json, ends, strict=True)
        if (mostly_json and not parses) or (mostly_ended and not ended) or (example.answer or "").count("```") % 2
    ]
    if places:
        yield _finding("truncated_answer", "warning", places, f"answers of {name} seem to stop early")


def casing(name: str, values: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Labels that differ in case or white space alone: the less common writings."""
    groups: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _, value in values:
        groups[folded(value)][value] += 1
    odd = {value for writings in groups.values() for value, _ in writings.most_common()[1:]}
    places = [f"{place}: {value!r}" for place, value in values if value in odd]
    if places:
        usual = ", ".join(sorted({repr(groups[folded(value)].most_common(1)[0][0]) for value in odd}))
        yield _finding("label_casing", "warning", places, f"labels of {name} are usually written {usual}")


def balance(name: str, values: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """How often each label comes, and which are rare."""
    counts = Counter(folded(value) for _, value in values).most_common()
    if len(counts) < 2:
        return
    rare = [label for label, count in counts if count < _RARE * counts[0][1]]
    shares = ", ".join(f"{label} {count / len(values):.1%}" for label, count in counts)
    level: Level = "warning" if rare else "info"
    words = f"; rare: {', '.join(rare)}" if rare else ""
    yield Finding("class_balance", level, len(counts), f"labels of {name}: {shares}{words}")


def languages(examples: Sequence[Example]) -> Iterator[Finding]:
    """Languages of the texts, where they can be told; every one but the most common is worth a look."""
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    told = [(example, _language(identifier, example.text)) for example in examples]
    counts = Counter(language for _, language in told if language).most_common()
    others = dict(counts[1:])
    if others:
        places = [f"{example.place}: {language}" for example, language in told if language in others]
        mix = ", ".join(f"{language} {count:,}" for language, count in counts)
        yield _finding("language_mix", "warning", places, f"examples are not in {counts[0][0]}, as most are ({mix})")


def size(examples: int, least: int) -> Iterator[Finding]:
    """Whether there are enough distinct examples."""
    if examples < least:
        mend = "add examples, or lower data.min_examples"
        yield Finding("too_few", "error", examples, f"distinct examples, but there must be at least {least}; {mend}")
    elif examples < FEW:
        yield Finding("few", "warning", examples, f"distinct examples; fewer than {FEW} seldom teach a model much")


def _labels(examples: Sequence[Example]) -> dict[str, list[tuple[str, str]]]:
    """By field of a JSON answer, or ``answer`` itself: place and value, where the values are labels."""
    parsed = [(example.place, json_object(example.answer or "")) for example in examples]
    fields: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    if mostly([value is not None for _, value in parsed]):
        for place, value in parsed:
            for name, text in (value or {}).items():
                fields[name] += [(place, text)] if isinstance(text, str) else []
    else:
        fields["answer"] = [(example.place, example.answer or "") for example in examples]
    labels = {name: values for name, values in fields.items() if are_labels([value for _, value in values])}
    return {name: [one for one in values if len(one[1]) <= LABEL_LENGTH] for name, values in labels.items()}


def _language(identifier: Any, text: str) -> str | None:
    if sum(character.isalpha() for character in text) < _LETTERS:
        return None
    language, probability = identifier.classify(text)
    return language if probability >= _SURE else None


def _ends_well(answer: str) -> bool:
    return answer.rstrip()[-1:] in tuple(".!?…\"')]}`。！？:;")


def _by(examples: Iterable[Example], key: Callable[[Example], str]) -> dict[str, list[Example]]:
    groups: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[key(example)].append(example)
    return groups


def _finding(check: str, level: Level, places: Sequence[str], message: str) -> Finding:
    return Finding(check, level, len(places), message, tuple(places[:_SHOWN]))


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in short, ``3, 7-9``, and where that is long still, how many more there are."""
    known = set(numbers)
    starts = [number for number in numbers if number - 1 not in known]
    ends = [number for number in numbers if number + 1 not in known]
    pairs = list(zip(starts, ends, strict=True))
    told = [str(start) if start == end else f"{start}-{end}" for start, end in pairs[:_RANGES]]
    rest = sum(end - start + 1 for start, end in pairs[_RANGES:])
    return ", ".join([*told, f"and {rest:,} more"] if rest else told)


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def _tail(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"…{text[-length:]}"
