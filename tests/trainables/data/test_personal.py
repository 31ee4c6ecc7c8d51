from __future__ import annotations

import socket

import pytest

from cluster.personal import Recogniser
from trainables.data.formats import Example
from trainables.data.personal import look_through
from trainables.spec import PersonalDataSpec

FOUND = {
    "ada@example.com": "EMAIL_ADDRESS",
    "+44 20 7946 0958": "PHONE_NUMBER",
    "(212) 555-0187": "PHONE_NUMBER",
    "4111 1111 1111 1111": "CREDIT_CARD",
    "378282246310005": "CREDIT_CARD",
    "DE89 3704 0044 0532 0130 00": "IBAN_CODE",
    "203.0.113.77": "IP_ADDRESS",
    "2001:db8::1": "IP_ADDRESS",
    "536-90-4399": "NATIONAL_ID",
    "12345678Z": "NATIONAL_ID",
    "AKIAIOSFODNN7EXAMPLE": "API_KEY",
    "ghp_" + "a1B2c3D4e5F6g7H8i9" * 2: "API_KEY",
    "sk-ant-api03-" + "a1B2c3D4e5F6g7H8i9J0": "API_KEY",
    "hf_" + "abcdefghij" * 4: "API_KEY",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w": "API_KEY",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----": "API_KEY",
}

NOT_FOUND = [
    "4111-1111-1111-1112",  # Luhn's digit is wrong
    "DE00 3704 0044 0532 0130 00",  # so is the IBAN's
    "invoice 20231105 over 316760 pieces",
    "it is 12:30:15 now, in version 1.2",
    "ada at example dot com",
]


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser()


@pytest.mark.parametrize("value", FOUND)
def test_each_kind_is_found_whole_and_alone(value: str, recogniser: Recogniser) -> None:
    text = f"it is {value} here"
    assert [(text[start:end], entity) for start, end, entity in recogniser.find(text)] == [(value, FOUND[value])]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_like_it_is_not(text: str, recogniser: Recogniser) -> None:
    assert recogniser.find(text) == []


def test_a_key_goes_before_what_else_could_be_seen_in_it(recogniser: Recogniser) -> None:
    text = "from https://ada:hunter2@example.com/db it is"
    assert [(text[start:end], entity) for start, end, entity in recogniser.find(text)] == [
        ("://ada:hunter2@", "API_KEY")
    ]


def test_no_network_is_asked(recogniser: Recogniser, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Recogniser().find("ada@example.co.uk")


def test_one_value_has_one_placeholder_in_an_example_however_it_is_written() -> None:
    messages = [
        {"role": "user", "content": "I am ada@example.com, call +44 20 7946 0958, not bob@example.com"},
        {"role": "assistant", "content": "ADA@example.com, I call +442079460958."},
    ]
    example = Example(messages, "x.jsonl", 1)
    (redacted, other), account = look_through([example, Example(messages[1:], "x.jsonl", 2)],
                                              PersonalDataSpec(action="redact"))  # fmt: skip
    assert [message["content"] for message in redacted.messages] == [
        "I am <EMAIL_ADDRESS_1>, call <PHONE_NUMBER_1>, not <EMAIL_ADDRESS_2>",
        "<EMAIL_ADDRESS_1>, I call <PHONE_NUMBER_1>.",
    ]
    assert other.messages[0]["content"] == "<EMAIL_ADDRESS_1>, I call <PHONE_NUMBER_1>."
    assert account.values == {"EMAIL_ADDRESS": 4, "PHONE_NUMBER": 3}
    assert account.places[1] == ("x.jsonl:2", {"EMAIL_ADDRESS": 1, "PHONE_NUMBER": 1})


def test_regions_and_kinds_are_the_definitions() -> None:
    pesel = "my number is 44051401359"
    assert not Recogniser().find(pesel)
    assert [one[2] for one in Recogniser(regions=("PL",)).find(pesel)] == ["NATIONAL_ID"]
    assert not Recogniser(("API_KEY",)).find("ada@example.com")
