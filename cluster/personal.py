"""Personal data and secrets in texts: found by Presidio's and detect-secrets' recognisers, without any model.

Importing this takes two seconds; the names of what is found are in ``entities``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import tldextract
from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.ip_public import IPPublicDetector
from detect_secrets.plugins.private_key import PrivateKeyDetector

from cluster.entities import ENTITIES, REGIONS, Entity, Region
from cluster.imports import without

with without("torch", "transformers"):  # for language models, which Presidio and spaCy would load where they are there
    import presidio_analyzer.predefined_recognizers as presidio
    from presidio_analyzer import EntityRecognizer, Pattern, PatternRecognizer

CERTAIN = 0.4
"""Presidio's score from which a match counts: below it stand bare runs of digits that need context to mean anything."""

_NATIONAL_IDS: dict[str, tuple[Callable[[], EntityRecognizer], ...]] = {
    "AU": (presidio.AuTfnRecognizer, presidio.AuMedicareRecognizer),
    "CA": (presidio.CaSinRecognizer,),
    "DE": (presidio.DeTaxIdRecognizer,),
    "ES": (presidio.EsNifRecognizer, presidio.EsNieRecognizer),
    "FI": (presidio.FiPersonalIdentityCodeRecognizer,),
    "FR": (),
    "GB": (presidio.UkNinoRecognizer, presidio.NhsRecognizer),
    "IN": (presidio.InAadhaarRecognizer, presidio.InPanRecognizer),
    "IT": (presidio.ItFiscalCodeRecognizer,),
    "KR": (presidio.KrRrnRecognizer,),
    "PL": (presidio.PlPeselRecognizer,),
    "SE": (presidio.SePersonnummerRecognizer,),
    "SG": (presidio.SgFinRecognizer,),
    "TH": (presidio.ThTninRecognizer,),
    "TR": (presidio.TrNationalIdRecognizer,),
    "US": (presidio.UsSsnRecognizer, presidio.UsItinRecognizer),
}

_OTHER_KEYS = PatternRecognizer(
    "API_KEY",
    patterns=[
        Pattern("private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----.+?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", 1.0),
        Pattern("JSON Web Token", r"\beyJ[\w-]+\.eyJ[\w-]+\.[\w-]*", 1.0),
        Pattern("Anthropic", r"\bsk-ant-[\w-]{20,}", 1.0),
        Pattern("OpenAI", r"\bsk-(?:proj|svcacct|admin)-[\w-]{20,}", 1.0),
        Pattern("Hugging Face", r"\bhf_[A-Za-z0-9]{30,}", 1.0),
        Pattern("Google", r"\bAIza[\w-]{35}", 1.0),
    ],
    global_regex_flags=re.DOTALL,  # Presidio's own default would ignore case
)
"""Keys that detect-secrets does not know, and whole ones where it finds their first part."""

_LEAST_DIGITS = 9

_NO_MODEL: Any = None
"""What a language model would say of a text; recognisers by form do without."""

_UNMISTAKABLE = 2.0
"""Certainty of a key: it goes before anything that Presidio finds inside it."""

_Found = tuple[int, int, str, float]
"""Start, end, entity, certainty."""


class _Email(presidio.EmailRecognizer):
    """Presidio's, with the list of public suffixes that tldextract brings: its default asks the network for one."""

    suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)

    def validate_result(self, pattern_text: str) -> bool:
        return self.suffixes(pattern_text).fqdn != ""


class Recogniser:
    """Finds ``wanted`` entities; national ids, and phone numbers without a country code, of ``regions``."""

    def __init__(self, wanted: Collection[Entity] = ENTITIES, regions: Sequence[Region] = REGIONS) -> None:
        self._presidio: list[tuple[str, EntityRecognizer]] = [
            (entity, recogniser) for entity, recogniser in _recognisers(regions) if entity in wanted
        ]
        self._keys = _key_patterns() if "API_KEY" in wanted else []

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """Start, end and entity of everything found, none over another: the more certain, then the longer one stays."""
        found = sorted(self._all(text), key=lambda one: (-one[3], one[0] - one[1]))
        kept: list[tuple[int, int, str]] = []
        for start, end, entity, _ in found:
            if all(end <= other_start or other_end <= start for other_start, other_end, _ in kept):
                kept.append((start, end, entity))
        return sorted(kept)

    def _all(self, text: str) -> Iterator[_Found]:
        for entity, recogniser in self._presidio:
            for one in recogniser.analyze(text, recogniser.supported_entities, _NO_MODEL):
                if one.score >= CERTAIN and not (entity == "PHONE_NUMBER" and _is_short(text[one.start : one.end])):
                    yield one.start, one.end, entity, _UNMISTAKABLE if entity == "API_KEY" else one.score
        for pattern in self._keys:
            yield from ((match.start(), match.end(), "API_KEY", _UNMISTAKABLE) for match in pattern.finditer(text))


class Redaction:
    """Placeholders in the texts of one example or one conversation: the same for the same value."""

    def __init__(self, recogniser: Recogniser) -> None:
        self._find, self._seen = recogniser.find, dict[tuple[str, str], str]()
        self.counts = Counter[str]()
        """Of what was found so far, by entity."""

    def __call__(self, text: str) -> str:
        pieces, last = [], 0
        for start, end, entity in self._find(text):
            self.counts[entity] += 1
            value = entity, _folded(text[start:end])
            numbered = f"<{entity}_{1 + sum(known == entity for known, _ in self._seen)}>"
            pieces += [text[last:start], self._seen.setdefault(value, numbered)]
            last = end
        return "".join([*pieces, text[last:]])


def _is_short(number: str) -> bool:
    """Whether a phone number could as well be any number: a bare run of few digits, as some countries have them."""
    return number.isdigit() and len(number) < _LEAST_DIGITS


def _folded(value: str) -> str:
    """One person's number or address, however it is written: letters and digits alone, in one case."""
    return "".join(character for character in value.casefold() if character.isalnum() or character == "@")


def _recognisers(regions: Sequence[Region]) -> Iterator[tuple[str, EntityRecognizer]]:
    yield "EMAIL_ADDRESS", _Email()
    yield "PHONE_NUMBER", presidio.PhoneRecognizer(supported_regions=regions)
    yield "CREDIT_CARD", presidio.CreditCardRecognizer()
    yield "IBAN_CODE", presidio.IbanRecognizer()
    yield "IP_ADDRESS", presidio.IpRecognizer()
    yield "API_KEY", _OTHER_KEYS
    yield from (("NATIONAL_ID", kind()) for region in regions for kind in _NATIONAL_IDS[region])


def _key_patterns() -> list[re.Pattern[str]]:
    """Of all kinds of key that detect-secrets knows by their form; not of what it guesses by entropy."""
    others = (IPPublicDetector, PrivateKeyDetector)
    kinds: dict[str, Any] = get_mapping_from_secret_type_to_class()
    known = [kind for kind in kinds.values() if issubclass(kind, RegexBasedDetector) and not issubclass(kind, others)]
    return [pattern for kind in known for pattern in kind().denylist]
