"""No secret in a log or an error, whatever a child prints and in whatever pieces it comes."""

import os
import random
import sys
from pathlib import Path

import pytest

from gemma_gguf.errors import ToolFailedError
from gemma_gguf.llama_cpp import RunLog, run_tool
from gemma_gguf.redact import Redactor, known_secrets

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0dEf"
OTHER = "s3cr3t-of-another-kind"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        pytest.param(f"token={TOKEN}\n", "token=[secret]\n", id="token"),
        pytest.param(f"{TOKEN},{TOKEN}", "[secret],[secret]", id="two in a row"),
        pytest.param("x" * 5000 + " " + TOKEN, "x" * 5000 + " [secret]", id="after a long word"),
        pytest.param(f"{OTHER} {OTHER}", "[secret] [secret]", id="a known one, twice"),
        pytest.param("https://me:pass@host/simple", "https://[secret]@host/simple", id="password in an address"),
        pytest.param("https://host/a@b:c", "https://host/a@b:c", id="no password"),
        pytest.param("hf_hub hf_short chf_" + "x" * 30, "hf_hub hf_short chf_" + "x" * 30, id="names"),
        pytest.param("[ 1/ 18] blk.0.attn_q.weight", "[ 1/ 18] blk.0.attn_q.weight", id="nothing"),
        pytest.param("ends with hf", "ends with hf", id="a beginning that stays one"),
        pytest.param(OTHER[:-1], OTHER[:-1], id="all but the last letter"),
    ],
)
def test_what_is_shown(said: str, shown: str) -> None:
    assert Redactor([OTHER]).text(said) == shown
    for seed in range(20):
        redactor, pieces = Redactor([OTHER]), random.Random(seed)
        data, out = said.encode(), b""
        while data:
            n = pieces.randint(1, 5)
            out += redactor.feed(data[:n])
            data = data[n:]
        assert (out + redactor.rest()).decode() == shown


def test_which_secrets_are_known(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_stored_token\n")
    environment = {
        "HF_TOKEN": TOKEN,
        "MY_API_KEY": "key-of-mine",
        "DB_PASSWORD": "password-of-mine",
        "SHORT_TOKEN": "none",
        "TOKENIZERS_PARALLELISM": "false-or-true",
        "HF_HOME": str(tmp_path),
    }
    assert known_secrets(environment) == {TOKEN, "key-of-mine", "password-of-mine", "hf_stored_token"}
    assert known_secrets({"HF_HOME": str(tmp_path / "none")}) == frozenset()
    (tmp_path / "token").write_bytes(b"\xff")
    assert known_secrets({"HF_TOKEN_PATH": str(tmp_path / "token")}) == frozenset()


LEAKY = """
import os, sys, time
print("HF_TOKEN is", os.environ.get("HF_TOKEN"), flush=True)
token = os.environ["LEAK"]
for place in range(0, len(token), 7):  # in pieces, as a pipe may give it
    sys.stdout.write(token[place:place + 7])
    sys.stdout.flush()
    time.sleep(0.02)
print()
print("my password is", os.environ["SOME_PASSWORD"])
sys.exit(int(os.environ["CODE"]))
"""


@pytest.mark.parametrize("code", ["0", "3"])
def test_a_childs_log_and_error_hold_no_secret(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is not in the child's environment; what it got elsewhere and prints is taken out; argv, too."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SOME_PASSWORD", OTHER)
    log = RunLog(tmp_path / "run.log")
    argv, env = [sys.executable, "-c", LEAKY, TOKEN], {"LEAK": TOKEN, "CODE": code}
    said = ""
    if code == "0":
        run_tool(argv, log=log, env=env)
    else:
        with pytest.raises(ToolFailedError) as caught:
            run_tool(argv, log=log, env=env)
        said = caught.value.what
        assert caught.value.log == tmp_path / "run.log"
        assert said.endswith("Its last lines:\nHF_TOKEN is None\n[secret]\nmy password is [secret]")
    log.close()
    text = (tmp_path / "run.log").read_text()
    assert TOKEN not in text + said
    assert OTHER not in text + said
    assert "HF_TOKEN is None\n[secret]\nmy password is [secret]\n## " in text
    assert f"exit code {code} after " in text
    assert os.environ["HF_TOKEN"] == TOKEN


def test_a_log_is_whole_after_every_line(tmp_path: Path) -> None:
    """Nothing but the beginning of a secret is kept back: what a killed run wrote is there."""
    log = RunLog(tmp_path / "run.log")
    log.write(b"[1]5.4321,[2]5.1234,")
    assert (tmp_path / "run.log").read_bytes() == b"[1]5.4321,[2]5.1234,"
    log.write(b" hf_")
    log.note("next")
    assert (tmp_path / "run.log").read_bytes().startswith(b"[1]5.4321,[2]5.1234, hf_## ")
    log.close()
