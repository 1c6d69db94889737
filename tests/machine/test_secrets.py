"""Secrets are found wherever they lie in a file, and text for people shows none, nor anything that acts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_lfm.machine.secrets import FORMS, PART, find_secrets, mask_secrets
from mergekit_lfm.machine.text import printable, printable_line, printable_message

SECRETS = {
    "hf_" + "a1" * 17: "a token of the Hub",
    "hf_oauth_" + "eyJ.x-" * 5: "a token of the Hub",
    "api_org_" + "b" * 34: "a token of the Hub",
    "ghp_" + "c" * 36: "a token of GitHub",
    "github_pat_" + "d" * 22 + "_" + "e" * 59: "a token of GitHub",
    "glpat-" + "f-" * 10: "a token of GitLab",
    "AKIA" + "G7" * 8: "a key of AWS",
    "sk-proj-" + "h_" * 20: "a key of OpenAI or Anthropic",
    "sk-" + "i" * 48: "a key of OpenAI or Anthropic",
    "xoxb-1234567890-abc": "a token of Slack",
    "-----BEGIN PRIVATE KEY-----": "a private key",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "a private key",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----": "a private key",
}


def test_every_form_has_an_example() -> None:
    assert {*SECRETS.values()} == {*FORMS}


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_found_and_masked(secret: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(f"one\ntwo\nkey={secret} end\n")
    assert find_secrets(file) == [(3, SECRETS[secret])]
    assert mask_secrets(f"/data/{secret}/x") == f"/data/[{SECRETS[secret]}]/x"


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download_prepare_inputs_for_generation_with_cache",
        "special_tokens_map",
        "task-" + "a" * 40,
        "x" + "AKIA" + "G" * 16,
        "sk-learn-wrapper-for-everything-you-need",
        "-----BEGIN CERTIFICATE-----",
        "-----BEGIN PUBLIC KEY-----",
        "xoxb",
    ],
)
def test_other_words_are_no_secrets(text: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    assert find_secrets(file) == [] and mask_secrets(text) == text


def test_a_secret_is_found_across_the_border_of_two_parts(tmp_path: Path) -> None:
    secret, file = "hf_" + "a" * 34, tmp_path / "file"
    for start in (0, PART - 40, PART - 37, PART - 20, PART - 1, PART, 2 * PART - 4096, 2 * PART - 10, 3 * PART - 5):
        file.write_bytes(b"\n" * start + secret.encode() + b"\n" * 100)
        assert find_secrets(file) == [(start + 1, "a token of the Hub")], start


def test_a_longer_word_across_the_border_is_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for start in (PART - 4096, PART - 4095, PART - 1, PART):
        file.write_bytes(b"\n" * start + b"xAKIA" + b"G" * 16 + b"\n" * PART)
        assert find_secrets(file) == []


def test_control_characters_are_escaped() -> None:
    assert printable_line("a\x1b[2J\rb\x07\x7f\x9b") == r"a\x1b[2J\rb\x07\x7f\x9b"
    assert printable_line("a\nerror: b\u2028c") == r"a\nerror: b\u2028c"
    assert printable_line("gpj.\u202eexe\ud800\U000e0001") == r"gpj.\u202eexe\ud800\U000e0001"
    words = "gr\u00f6\u00dfe \u65e5\u672c\u3000 \u0645\u06cc\u200c\u062e\u0648 \U0001f469\u200d\U0001f52c"
    assert printable_line(words) == words
    assert printable("one\x1b\ntwo") == "one\\x1b\ntwo"
    assert "hf_" not in printable("x hf_" + "a" * 34)


def test_a_message_has_only_its_own_lines() -> None:
    message = "the models differ, 2 problems:\n  a: x\n  b: y\nMerge models of one architecture."
    assert printable_message(message) == message
    assert printable_message("a: x\nerror: y") == r"a: x\nerror: y"
    assert printable_message("a: x\nDone.\nerror: y\n  z") == "a: x\\nDone.\\nerror: y\n  z"
