"""Publishing: the plan and the refusals as tables, uploads with the real client to a server that has its faults."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants, snapshot_download

from gemma_gguf import card, cli, factory, hub, manifest, proof, publish, publishing
from gemma_gguf.doctor import Account, Facts, cannot_write, judge
from gemma_gguf.errors import BadInputError, GemmaGGUFError, VerificationError
from gemma_gguf.files import link_or_copy, sha256_bytes, sha256_file
from gemma_gguf.hub import PassingError, Repository
from gemma_gguf.manifest import Evidence, FileEntry, Manifest, Picture, RemotePlace
from gemma_gguf.publish import Candidate, Listing, LocalFile, Operation, RemoteFile, make_plan
from gemma_gguf.session import Done, Options, PublishOptions, Report, given_checks
from tests.examples import STEM, example, failed, sha
from tests.hub import Fault, Hub, Reply, Repo, files_of, serving, xet_files

# The client calls its own HTTP library in a way that this deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

REPO = f"test/{STEM}-GGUF"
TOKEN = "hf_" + "w" * 30
RECIPES = ("Q8_0", "Q4_K_M", "IQ2_XS")


# --- the plan ------------------------------------------------------------------------------------------------------

Q4, Q8, IMATRIX, MMPROJ = (
    f"{STEM}-Q4_K_M.gguf",
    f"{STEM}-Q8_0.gguf",
    f"{STEM}-imatrix.gguf",
    f"mmproj-{STEM}-f16.gguf",
)
COMMIT = "0123456789" * 4


def local(name: str, n_bytes: int = 100) -> LocalFile:
    return LocalFile(n_bytes, sha(name), git_id=f"git of {name}")


def there(name: str, n_bytes: int = 100, *, large: bool = True) -> RemoteFile:
    return RemoteFile(n_bytes, f"git of {name}", sha(name) if large else None)


def small_facts(*names: str) -> Manifest:
    """A manifest of these files of the example."""
    facts = example()
    return facts.model_copy(update={"files": [entry for entry in facts.files if entry.name in names]})


PLANS: dict[str, tuple[dict[str, LocalFile], dict[str, RemoteFile], list[tuple[str, str, str]], list[list[str]]]] = {
    "everything is new": (
        {name: local(name) for name in (Q4, IMATRIX, MMPROJ, "README.md", "quantset.json", "assets/a.svg")},
        {".gitattributes": there(".gitattributes", large=False)},
        [
            ("upload", IMATRIX, "not in the repository"),
            ("upload", MMPROJ, "not in the repository"),
            ("upload", Q4, "not in the repository"),
            ("upload", "README.md", "not in the repository"),
            ("upload", "assets/a.svg", "not in the repository"),
            ("upload", "quantset.json", "not in the repository"),
        ],
        [[IMATRIX], [MMPROJ], [Q4], ["README.md", "assets/a.svg", "quantset.json"]],
    ),
    "everything is there": (
        {name: local(name) for name in (Q4, "README.md")},
        {Q4: there(Q4), "README.md": there("README.md", large=False)},
        [("skip", Q4, "the same bytes are there"), ("skip", "README.md", "the same bytes are there")],
        [],
    ),
    "other bytes of the same size": (
        {Q4: local(Q4), "README.md": local("README.md")},
        {Q4: there("another"), "README.md": there("another", large=False)},
        [
            ("replace", Q4, f"other bytes there: sha256 {sha('another')[:9]} for {sha(Q4)[:9]}"),
            ("replace", "README.md", "other bytes there"),
        ],
        [[Q4], ["README.md"]],
    ),
    "another size": (
        {Q4: local(Q4)},
        {Q4: there(Q4, 12_345)},
        [("replace", Q4, "another size there: 12,345 bytes")],
        [[Q4]],
    ),
    "weights too large for git itself are told by SHA-256 alone": (
        {Q4: LocalFile(100, sha(Q4), git_id=None)},
        {Q4: there(Q4, large=False)},
        [("replace", Q4, "other bytes there")],
        [[Q4]],
    ),
}


@pytest.mark.parametrize(("here", "remote", "operations", "commits"), PLANS.values(), ids=PLANS)
def test_plan(
    here: dict[str, LocalFile],
    remote: dict[str, RemoteFile],
    operations: list[tuple[str, str, str]],
    commits: list[list[str]],
) -> None:
    made = make_plan(small_facts(*here), here, Listing(COMMIT, private=True, files=remote), REPO)
    assert [(o.action, o.name, o.reason) for o in made.operations] == operations
    assert [[o.name for o in group] for group in made.groups] == commits
    assert (made.creates, made.makes_public) == (False, False)
    assert made.is_done == (not commits)


@pytest.mark.parametrize("prune", [False, True])
def test_what_the_set_does_not_name_stays_unless_pruned(prune: bool) -> None:
    here = {Q4: local(Q4), "README.md": local("README.md")}
    remote = {"old-Q4_K_M.gguf": there("old"), ".gitattributes": there("a"), "README.md": there("b", large=False)}
    made = make_plan(small_facts(Q4), here, Listing(COMMIT, files=remote), REPO, others={"notes.txt": 7}, prune=prune)
    reason = "not in the set" if prune else "not in the set; --prune deletes it"
    assert [(o.action, o.name, o.reason) for o in made.operations[2:]] == [
        ("delete" if prune else "keep", "old-Q4_K_M.gguf", reason),
        ("leave", "notes.txt", "not named by quantset.json"),
    ]
    # What the old card links to goes in the commit that brings the new card.
    assert [[o.name for o in group] for group in made.groups] == [
        [Q4],
        ["README.md", "old-Q4_K_M.gguf"] if prune else ["README.md"],
    ]
    assert made.n_bytes == 200


def test_a_folder_of_shards_is_one_commit() -> None:
    entry = example().files[-1]
    names = [f"{STEM}-bf16/{STEM}-bf16-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    facts = example().model_copy(update={"files": [entry.model_copy(update={"name": name}) for name in names]})
    made = make_plan(facts, {name: local(name) for name in (*names, "README.md")}, Listing(COMMIT), REPO)
    assert [[o.name for o in group] for group in made.groups] == [names, ["README.md"]]
    assert [publish.summary(group) for group in made.groups] == [f"Add {STEM}-bf16, 3 shards", "Update the card"]


def test_a_new_repository_that_becomes_public() -> None:
    made = make_plan(small_facts(Q4), {Q4: local(Q4)}, Listing(), REPO, public=True)
    assert (made.creates, made.makes_public, made.is_done) == (True, True, False)
    again = make_plan(small_facts(Q4), {Q4: local(Q4)}, Listing(COMMIT, False, {Q4: there(Q4)}), REPO, public=True)
    assert (again.creates, again.makes_public, again.is_done) == (False, False, True)


def published(entry: FileEntry, repo: str = REPO) -> FileEntry:
    """An entry whose file is in the repository alone."""
    return entry.model_copy(update={"state": "remote", "remote": RemotePlace(repo=repo, commit=COMMIT)})


def test_a_published_file_need_not_be_here() -> None:
    facts = small_facts(Q4)
    facts = facts.with_file(published(facts.files[0]))
    made = make_plan(facts, {}, Listing(COMMIT, files={Q4: there(Q4)}), REPO)
    assert [(o.action, o.name, o.reason) for o in made.operations] == [
        ("skip", Q4, "published before, not on this disk: commit 012345678")
    ]


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ([Operation("upload", Q4, 1, "")], f"Add {Q4}"),
        ([Operation("replace", Q4, 1, "")], f"Replace {Q4}"),
        ([Operation("upload", "README.md", 1, ""), Operation("delete", Q4, 1, "")], "Update the card, delete 1 file"),
        ([Operation("delete", Q4, 1, "")], f"Delete {Q4}"),
        ([Operation("delete", Q4, 1, ""), Operation("delete", Q8, 1, "")], "Delete 2 files"),
        ([Operation("replace", "quantset.json", 1, "")], "Update what describes the set"),
    ],
)
def test_messages_of_commits(operations: list[Operation], message: str) -> None:
    assert publish.summary(operations) == message


# --- refusals ------------------------------------------------------------------------------------------------------


def candidate(**changes: Any) -> Candidate:
    """The example, ready to be published."""
    facts = example().model_copy(update={"pictures": {}})
    files = {entry.name: LocalFile(entry.n_bytes, entry.sha256) for entry in facts.files}
    front = dict(card.front_matter(facts).to_dict())  # type: ignore[no-untyped-call]
    return replace(Candidate(facts, files, {"README.md": front}, Listing(), REPO), **changes)


def changed(name: str, **changes: Any) -> Candidate:
    """The same with another local file of that name."""
    ready = candidate()
    return replace(ready, local={**ready.local, name: replace(ready.local[name], **changes)})


def with_entry(name: str, **changes: Any) -> Candidate:
    ready = candidate()
    entry = ready.facts.file(name)
    assert entry is not None
    return replace(ready, facts=ready.facts.with_file(entry.model_copy(update=changes)))


def with_model(**changes: Any) -> Candidate:
    ready = candidate()
    model = ready.facts.model.model_copy(update=changes)
    return replace(ready, facts=ready.facts.model_copy(update={"model": model}))


def only_there(found: dict[str, RemoteFile], repo: str = REPO) -> Candidate:
    """One model is in the repository alone, as the manifest says."""
    ready = candidate()
    entry = ready.facts.file(Q4)
    assert entry is not None
    kept = {name: file for name, file in ready.local.items() if name != Q4}
    facts = ready.facts.with_file(published(entry, repo))
    return replace(ready, facts=facts, local=kept, remote=Listing(COMMIT, files=found))


def without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def front_without(key: str) -> Candidate:
    ready = candidate()
    front = ready.cards["README.md"]
    assert front is not None
    return replace(ready, cards={"README.md": without(front, key)})


def entry_of(name: str) -> FileEntry:
    entry = example().file(name)
    assert entry is not None
    return entry


def _large(n_bytes: int) -> Candidate:
    """Nothing is measured: no larger file may be further from its base."""
    ready = with_entry(Q4, n_bytes=n_bytes)
    ready = replace(ready, facts=ready.facts.model_copy(update={"evidence": {}}))
    return replace(ready, local={**ready.local, Q4: replace(ready.local[Q4], n_bytes=n_bytes)})


def with_evidence(name: str, found: Evidence) -> Candidate:
    ready = candidate()
    evidence = {**ready.facts.evidence, entry_of(name).sha256: found}
    return replace(ready, facts=ready.facts.model_copy(update={"evidence": evidence}))


def _with_picture() -> Candidate:
    ready = candidate()
    picture = Picture(data_sha256=sha("data"), svg_sha256=sha("svg"), png_sha256=sha("png"))
    facts = ready.facts.model_copy(update={"pictures": {"quality": picture}})
    return replace(ready, facts=facts, local={**ready.local, "assets/quality.png": LocalFile(1, sha("png"))})


def _renamed(old: str, new: str) -> Candidate:
    ready = candidate()
    files = [entry.model_copy(update={"name": entry.name.replace(old, new)}) for entry in ready.facts.files]
    here = {name.replace(old, new): found for name, found in ready.local.items()}
    return replace(ready, facts=ready.facts.model_copy(update={"files": files}), local=here)


def _with_f16() -> Candidate:
    ready = candidate()
    entry = entry_of(Q8).model_copy(update={"name": f"{STEM}-F16.gguf", "recipe": "F16"})
    here = {**ready.local, entry.name: LocalFile(entry.n_bytes, entry.sha256)}
    return replace(ready, facts=ready.facts.with_file(entry), local=here)


REFUSED: dict[str, tuple[Callable[[], Candidate], str]] = {
    "demo": (
        lambda: with_model(base_is_dequantised=True),
        "the weights of this set were rebuilt from a quant (the demo): its files prove the factory, nothing else",
    ),
    "too large": (
        lambda: _large(500_000_000_001),
        f"{Q4} has 500,000,000,001 bytes, the Hub takes files up to 500,000,000,000",
    ),
    "changed file": (
        lambda: changed(Q4, sha256=sha("other")),
        f"{Q4} is not the file that quantset.json names: its sha256 is {sha('other')}",
    ),
    "cut file": (
        lambda: changed(Q4, n_bytes=7),
        f"{Q4} is not the file that quantset.json names: its sha256 is {sha(Q4)}",
    ),
    "missing file": (
        lambda: replace(candidate(), local=without(candidate().local, Q4)),
        f"{Q4} is missing",
    ),
    "published elsewhere": (
        lambda: only_there({Q4: there(Q4, entry_of(Q4).n_bytes)}, "other/place"),
        f"{Q4} is not on this disk, but in other/place",
    ),
    "published, but gone": (
        lambda: only_there({}),
        f"{Q4} is neither on this disk nor in {REPO}, where quantset.json says it is",
    ),
    "published, but replaced": (
        lambda: only_there({Q4: there("another", entry_of(Q4).n_bytes)}),
        f"{Q4} is neither on this disk nor in {REPO}, where quantset.json says it is",
    ),
    "path in a key": (
        lambda: changed(Q4, problem=f"{Q4}: key general.url holds a path of this machine: '/home/me'"),
        f"{Q4}: key general.url holds a path of this machine: '/home/me'",
    ),
    "never verified": (
        lambda: with_entry(Q4, checks=None),
        f"{Q4} was never verified (no checks in quantset.json)",
    ),
    "no card": (
        lambda: replace(candidate(), cards={"README.md": None}),
        "README.md is missing, or its front matter cannot be read",
    ),
    "no licence on the card": (
        lambda: front_without("license"),
        "README.md says nothing for license, the base model 'gemma'",
    ),
    "another licence on the card": (
        lambda: replace(candidate(), cards={"README.md": {**(candidate().cards["README.md"] or {}), "license": "mit"}}),
        "README.md says 'mit' for license, the base model 'gemma'",
    ),
    "no gating on the card": (
        lambda: front_without("extra_gated_heading"),
        "README.md says nothing for extra_gated_heading, the base model 'Access Gemma on Hugging Face'",
    ),
    "out of line": (
        lambda: with_evidence(Q4, failed()),
        f"{Q4}: gives no finite figures: its logits hold NaN or Inf",
    ),
    "picture missing": (
        _with_picture,
        "the picture assets/quality.svg is missing or changed",
    ),
    "a tag in the stem": (
        lambda: _renamed("google_gemma-3-4b-it", "google_gemma-3-4b-it-qat-q4_0"),
        "the tag Q4_0 is ambiguous: it names google_gemma-3-4b-it-qat-q4_0-Q4_0.gguf, and "
        "google_gemma-3-4b-it-qat-q4_0-IQ2_XS.gguf (and 4 more) matches it, too",
    ),
    "an older file in the repository": (
        lambda: replace(candidate(), remote=Listing(COMMIT, files={"gemma-3-4b-it.q4_k_m.gguf": there("old")})),
        f"the tag Q4_K_M is ambiguous: it names {Q4}, and gemma-3-4b-it.q4_k_m.gguf matches it, too",
    ),
    "F16 beside BF16": (
        _with_f16,
        f"the tag F16 is ambiguous: it names {STEM}-F16.gguf, and {STEM}-bf16.gguf matches it, too",
    ),
}


@pytest.mark.parametrize(("make", "what"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_first_byte(make: Callable[[], Candidate], what: str) -> None:
    found = publish.refusals(make())
    assert [finding.what for finding in found] == [what]
    assert found[0].next_step
    with pytest.raises(GemmaGGUFError) as caught:
        publish.refuse(found, REPO)
    assert caught.value.what == f"not published: {what}"


ACCEPTED: dict[str, Callable[[], Candidate]] = {
    "ready": candidate,
    "demo, asked for": lambda: replace(with_model(base_is_dequantised=True), allow_demo=True),
    "published, and there": lambda: only_there({Q4: there(Q4, entry_of(Q4).n_bytes)}),
    "an older file that goes": lambda: replace(
        candidate(), prune=True, remote=Listing(COMMIT, files={"gemma-3-4b-it.q4_k_m.gguf": there("old")})
    ),
    "a projector is no model": lambda: replace(
        candidate(), remote=Listing(COMMIT, files={"mmproj-gemma-Q8_0.gguf": there("old")})
    ),
    "no licence anywhere": lambda: replace(
        with_model(license=None, front_matter={}), cards={"README.md": {"quantized_by": "me"}}
    ),
}


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(make: Callable[[], Candidate]) -> None:
    assert publish.refusals(make()) == []
    publish.refuse([], REPO)


def test_all_refusals_are_one_error() -> None:
    ready = replace(with_model(base_is_dequantised=True), local=without(candidate().local, Q4))
    with pytest.raises(VerificationError) as caught:
        publish.refuse(publish.refusals(ready), REPO)
    assert caught.value.what.startswith(f"2 things forbid publishing to {REPO}:\n  the weights of this set")
    assert f"\n  {Q4} is missing" in caught.value.what
    assert "--allow-demo" in (caught.value.next_step or "")


def test_every_shard_of_a_file_may_match_its_tag() -> None:
    entry = entry_of(Q4)
    names = [f"{STEM}-Q4_K_M/{STEM}-Q4_K_M-0000{n}-of-00002.gguf" for n in (1, 2)]
    ready = candidate()
    rest = [other for other in ready.facts.files if other.name != Q4]
    facts = ready.facts.model_copy(update={"files": [*rest, *(entry.model_copy(update={"name": n}) for n in names)]})
    here = without(ready.local, Q4) | {name: LocalFile(entry.n_bytes, entry.sha256) for name in names}
    assert publish.refusals(replace(ready, facts=facts, local=here)) == []


def test_warnings() -> None:
    ready = _large(200_000_000_001)
    facts = ready.facts.model_copy(update={"recipes": ["Q4_K_M", "Q2_K"], "evidence": {}})
    assert [finding.what for finding in publish.warnings(replace(ready, facts=facts))] == [
        f"{Q4} has 200,000,000,001 bytes; the Hub recommends files below 200,000,000,000",
        "not made: Q2_K; the card says so",
        "quality not measured: 6 of 6 files; the card says so",
    ]
    assert publish.warnings(candidate()) == []


# --- accounts ------------------------------------------------------------------------------------------------------


def account(role: str = "write", **more: Any) -> Account:
    return Account("https://hub", reached=True, name="me", role=role, **more)


@pytest.mark.parametrize(
    ("who", "repo", "problem"),
    [
        (account(), "", None),
        (account(), "me/a", None),
        (account(orgs=("org",)), "org/a", None),
        (account(), "org/a", None),  # the Hub did not say which organisations there are
        (
            account(orgs=()),
            "org/a",
            "me may not write to org: the account is no member of it, or may only read there",
        ),
        (account("read"), "me/a", "the token of me may only read (read): nothing can be published with it"),
        (account("fineGrained", writes_to=("org",)), "org/a", None),
        (account("fineGrained", writes_to=("me/a",)), "me/a", None),
        (account("fineGrained", writes_to=("org",)), "me/a", "the token of me may write to org, not to me/a"),
        (
            account("fineGrained"),
            "me/a",
            "the token of me may only read (fineGrained): nothing can be published with it",
        ),
        (Account("https://hub", reached=True, problem="the hub does not accept it"), "", "the hub does not accept it"),
    ],
)
def test_what_an_account_may_write_to(who: Account, repo: str, problem: str | None) -> None:
    assert cannot_write(who, repo) == problem


@pytest.mark.parametrize(
    ("who", "hub_status", "publishing"),
    [
        (account(), "ok", ("ok", "the token of me may write")),
        (
            account("read"),
            "ok",
            ("fail", "the token of me may only read (read): nothing can be published with it"),
        ),
        (
            account(orgs=()),
            "ok",
            ("fail", "me may not write to org: the account is no member of it, or may only read there"),
        ),
        (
            Account("https://hub", reached=True),
            "ok",
            ("fail", "no token: nothing can be published, and gated models cannot be read"),
        ),
        (Account("https://hub", reached=False, problem="timed out"), "fail", None),
    ],
    ids=["may", "reads only", "not there", "no token", "no hub"],
)
def test_a_run_that_publishes_is_refused_at_its_start(
    who: Account, hub_status: str, publishing: tuple[str, str] | None
) -> None:
    """Elsewhere the same is a warning: most runs publish nothing."""
    for goal, worst in (("org/a", "fail"), (None, "warn")):
        checks = {check.name: check for check in judge(Facts(account=who, publishes_to=goal))}
        assert checks["hub"].status == (worst if hub_status == "fail" else "ok")
        told = checks.get("publishing")
        if publishing is None or (goal is None and "org" in publishing[1]):
            assert told is None or told.status == "ok"
        else:
            assert told is not None
            assert (told.status, told.what) == (worst if publishing[0] == "fail" else "ok", publishing[1])


@pytest.mark.parametrize(
    ("model", "how", "said"),
    [
        ("demo", PublishOptions(), "the demo's weights were rebuilt from a quant"),
        ("demo", PublishOptions(allow_demo=True), None),
        ("google/gemma-3-4b-it", PublishOptions(), None),
        ("google/gemma-3-4b-it", PublishOptions(stream=True), "--from compares all files with one of the set"),
    ],
)
def test_what_a_run_could_never_publish(model: str, how: PublishOptions, said: str | None) -> None:
    options = Options(model, publish=how, reference="Q8_0" if how.stream else None)
    (check,) = [check for subject, check in given_checks(options) if subject == "--publish"]
    if said is None:
        check()
    else:
        with pytest.raises(BadInputError, match=said):
            check()


@pytest.mark.parametrize(
    ("how", "recorded", "expected"),
    [
        (PublishOptions(repo="a/b"), "x/y", "a/b"),
        (PublishOptions(namespace="org"), None, f"org/{STEM}-GGUF"),
        (PublishOptions(namespace="org"), "x/y", "x/y"),
        (PublishOptions(), "x/y", "x/y"),
        (PublishOptions(), None, f"me/{STEM}-GGUF"),
    ],
)
def test_where_a_set_goes(how: PublishOptions, recorded: str | None, expected: str) -> None:
    facts = example()
    facts = facts.model_copy(update={"card": facts.card.model_copy(update={"repo": recorded})})
    assert publishing.repository_name(how, facts, account()) == expected


# --- uploads, with the real client ---------------------------------------------------------------------------------


def write_gguf(path: Path, n_elements: int, seed: int, **keys: str) -> None:
    """A whole GGUF file with one tensor of noise, which nothing compresses."""
    writer = gguf.GGUFWriter(path, "gemma3")
    for key, value in keys.items():
        writer.add_string(key.replace("__", "."), value)
    noise = np.random.default_rng(seed).standard_normal((n_elements // 64, 64), dtype=np.float32)
    writer.add_tensor("token_embd.weight", noise)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_set(directory: Path, *recipes: str, n_elements: int = 16_384) -> Manifest:
    """A small set with real files: imatrix, projector, a model for each recipe, Q8_0 in two shards, and the card."""
    directory.mkdir(parents=True)
    facts = example()
    files: list[FileEntry] = []
    for entry in facts.files:
        if entry.kind == "model" and entry.recipe not in recipes:
            continue
        folder = entry.name.removesuffix(".gguf")
        shards = [f"{folder}/{folder}-0000{n}-of-00002.gguf" for n in (1, 2)]
        for name in shards if entry.recipe == "Q8_0" else [entry.name]:
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            write_gguf(path, n_elements, seed=len(files))
            n_bytes, digest = path.stat().st_size, sha256_file(path)
            files.append(entry.model_copy(update={"name": name, "n_bytes": n_bytes, "sha256": digest}))
    imatrix = None if facts.imatrix is None else facts.imatrix.model_copy(update={"coverage": []})
    without_pictures: dict[str, Any] = {"evidence": {}, "pictures": {}, "imatrix": imatrix}
    choices = facts.card.model_copy(update={"repo": REPO})
    named = {"files": files, "card": choices, "recipes": [*recipes]}
    manifest.save(facts.model_copy(update=without_pictures | named), directory)
    factory.write_card(directory, card.Renderer())
    return manifest.load(directory)


@pytest.fixture
def no_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with serving() as hub:
        hub.open_for_writing(tmp_path / "store", **{TOKEN: "test"})
        yield hub


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets, written once."""
    root = tmp_path_factory.mktemp("sets")
    write_set(root / "three", *RECIPES)
    write_set(root / "one", "Q4_K_M")
    return root


@pytest.fixture
def set_dir(sets: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sets / "three", tmp_path / "out" / f"{STEM}-GGUF"))


@pytest.fixture
def small(sets: Path, tmp_path: Path) -> Path:
    """A set that is three commits of weights and one of a card."""
    return Path(shutil.copytree(sets / "one", tmp_path / "out" / f"{STEM}-GGUF"))


WEIGHTS = [
    [f"{STEM}-imatrix.gguf"],
    [f"mmproj-{STEM}-f16.gguf"],
    [f"{STEM}-Q8_0/{STEM}-Q8_0-00001-of-00002.gguf", f"{STEM}-Q8_0/{STEM}-Q8_0-00002-of-00002.gguf"],
    [f"{STEM}-Q4_K_M.gguf"],
    [f"{STEM}-IQ2_XS.gguf"],
]
LAST = ["README.md", "quantset.json"]
ALL_WEIGHTS = [name for group in WEIGHTS for name in group]


def published_to(server: Hub, set_dir: Path, how: PublishOptions | None = None, *, send: bool = True) -> list[Done]:
    """Publish in this process, with the server's address and a token; what was done."""
    done: list[Done] = []
    upload_to(server, set_dir, how or PublishOptions(), send=send, say=done.append)
    return done


def upload_to(
    server: Hub,
    set_dir: Path,
    how: PublishOptions,
    *,
    send: bool = True,
    say: Callable[[Done], None] = lambda _: None,
    pause: Callable[[float], None] = lambda _: None,
    token: str = TOKEN,
) -> publishing.Look:
    def connect(name: str) -> Repository:
        return Repository(name, endpoint=server.url, token=token)

    with publishing.opened(set_dir, how, say=say, connect=connect) as upload:
        upload.pause = pause
        seen = upload.look(manifest.load(set_dir), rehash=send)
        if send:
            upload.send(seen)
        return seen


def commits(repo: Repo) -> list[list[str]]:
    return [list(commit.files) for commit in repo.history]


def check_the_same(server: Hub, set_dir: Path, home: Path, *, token: str = TOKEN) -> None:
    """Download everything with the real client and compare: the same names, the same bytes."""
    got = Path(
        snapshot_download(REPO, endpoint=server.url, token=token, cache_dir=home / "cache", local_dir=home / "files")
    )
    names = [name for name in files_of(set_dir) if not name.startswith(".")]
    found = [name for name in files_of(got) if not name.startswith(".")]
    assert found == names
    assert {name: sha256_file(got / name) for name in names} == {name: sha256_file(set_dir / name) for name in names}


def check_nothing_doubled(repo: Repo) -> None:
    """Each file was committed once, each commit on top of the one before."""
    times = Counter(name for commit in repo.history for name in commit.files)
    assert [name for name, n in times.items() if n != 1] == []
    parents = [commit.parent for commit in repo.history[1:]]
    assert parents == [commit.commit for commit in repo.history[:-1]]


@pytest.mark.usefixtures("no_xet")
def test_weights_first_the_card_last_and_private_until_then(server: Hub, set_dir: Path, tmp_path: Path) -> None:
    server.part_size = 40_000  # every file goes in two parts
    published_to(server, set_dir, PublishOptions(public=True))
    repo = server.uploaded(REPO)
    assert commits(repo) == [*WEIGHTS, LAST]
    assert [commit.private for commit in repo.history] == [True] * 6
    assert repo.private is False
    assert [commit.message for commit in repo.history] == [
        f"Add {STEM}-imatrix.gguf",
        f"Add mmproj-{STEM}-f16.gguf",
        f"Add {STEM}-Q8_0, 2 shards",
        f"Add {STEM}-Q4_K_M.gguf",
        f"Add {STEM}-IQ2_XS.gguf",
        "Update the card",
    ]
    check_the_same(server, set_dir, tmp_path / "home")
    # The same again sends nothing.
    asked = len(server.requests)
    done = published_to(server, set_dir, PublishOptions(public=True))
    assert {(what.name, what.made, what.why) for what in done} == {
        (name, False, "the same bytes are there") for name in (*ALL_WEIGHTS, *LAST)
    }
    assert {request.method for request in server.requests[asked:]} == {"GET"}
    assert len(repo.history) == 6


@pytest.mark.usefixtures("no_xet")
def test_nothing_is_sent_unless_asked(server: Hub, set_dir: Path) -> None:
    seen = upload_to(server, set_dir, PublishOptions(), send=False)
    assert [operation.name for group in seen.plan.groups for operation in group] == [*ALL_WEIGHTS, *LAST]
    assert seen.plan.creates
    assert {request.method for request in server.requests} == {"GET"}


@pytest.mark.usefixtures("no_xet")
def test_only_what_changed_is_sent_again(server: Hub, set_dir: Path, tmp_path: Path) -> None:
    published_to(server, set_dir)
    repo = server.uploaded(REPO)
    entry = manifest.load(set_dir).file(Q4)
    assert entry is not None
    write_gguf(set_dir / Q4, 8_192, seed=99)
    new = entry.model_copy(update={"n_bytes": (set_dir / Q4).stat().st_size, "sha256": sha256_file(set_dir / Q4)})
    gone = manifest.load(set_dir).file(f"{STEM}-IQ2_XS.gguf")
    assert gone is not None
    facts = manifest.load(set_dir).with_file(new)
    facts = facts.model_copy(update={"files": [e for e in facts.files if e != gone], "recipes": ["Q8_0", "Q4_K_M"]})
    manifest.save(facts, set_dir)
    factory.write_card(set_dir, card.Renderer())
    (set_dir / gone.name).unlink()
    published_to(server, set_dir, PublishOptions(prune=True))
    assert commits(repo)[6:] == [[Q4], LAST]
    assert repo.history[-1].deleted == (gone.name,)
    assert repo.history[-1].message == "Update the card, delete 1 file"
    check_the_same(server, set_dir, tmp_path / "home")


# Each is met once, where it hurts: what the client tries again itself, and what only another look finds out.
FIVE: list[tuple[str, str, Fault]] = [
    ("PUT", r"/lfs/\w+/1", Fault("cut")),
    ("PUT", r"/lfs/\w+/2", Fault("status", 503)),
    ("POST", r".*/commit/main", Fault("lost")),
    ("POST", r".*/info/lfs/objects/batch", Fault("status", 429, {"Retry-After": "0"})),
    ("PUT", r"/lfs/\w+/2", Fault("status", 403)),
]


class Faults:
    """Each of a list of faults spoils the first request it fits."""

    def __init__(self, faults: list[tuple[str, str, Fault]]) -> None:
        self._left = list(faults)
        self._lock = threading.Lock()
        self.met: list[tuple[str, str]] = []

    def __call__(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for index, (wanted, pattern, fault) in enumerate(self._left):
                if wanted == method and re.fullmatch(pattern, path):
                    del self._left[index]
                    self.met.append((path, fault.how))
                    return fault
        return None

    @property
    def left(self) -> int:
        return len(self._left)


@pytest.mark.usefixtures("no_xet")
def test_five_faults_lose_and_double_nothing(server: Hub, set_dir: Path, tmp_path: Path) -> None:
    server.part_size = 40_000
    server.faults = faults = Faults(FIVE)
    waited: list[float] = []
    upload_to(server, set_dir, PublishOptions(), pause=waited.append)
    assert faults.left == 0
    repo = server.uploaded(REPO)
    assert commits(repo) == [*WEIGHTS, LAST]
    check_nothing_doubled(repo)
    check_the_same(server, set_dir, tmp_path / "home")
    # The lost answer and the address that was signed too long ago; the rest the client settled itself.
    assert waited == [2.0, 5.0]
    (log,) = (set_dir.parent / ".work").rglob("*-publish.log")
    text = log.read_text()
    assert "hub: the connection to the Hub broke" in text
    assert "hub: the storage refused an address that was signed too long ago" in text
    assert "signed?" not in text
    assert "X-Amz-Signature" not in text
    assert TOKEN not in text


@pytest.mark.usefixtures("no_xet")
@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the Hub does not accept the token ("),
        (403, f"this token may not write to {REPO} ("),
        (404, f"there is no {REPO} on the Hub, or this token cannot see it"),
        (400, "the Hub does not accept it: on purpose: 400"),
    ],
)
def test_what_does_not_pass_is_told_and_resumed(status: int, said: str, server: Hub, small: Path) -> None:
    server.faults = faults = Faults([("POST", r".*/commit/main", Fault("status", status))])
    with pytest.raises(BadInputError) as caught:
        published_to(server, small)
    assert caught.value.what.startswith(said)
    assert caught.value.log is not None
    assert TOKEN not in caught.value.what
    assert faults.left == 0
    published_to(server, small)
    repo = server.uploaded(REPO)
    check_nothing_doubled(repo)
    assert commits(repo) == [WEIGHTS[0], WEIGHTS[1], [Q4], LAST]


@pytest.mark.usefixtures("no_xet")
def test_a_hub_that_stays_away_is_told(server: Hub, small: Path) -> None:
    server.faults = lambda method, path: Fault("status", 500) if path.endswith("/commit/main") else None
    waited: list[float] = []
    with pytest.raises(PassingError, match="the Hub answered 500") as caught:
        upload_to(server, small, PublishOptions(), pause=waited.append)
    assert waited == list(publishing.PATIENCE)
    assert "what has arrived is not sent again" in (caught.value.next_step or "")


@pytest.mark.usefixtures("no_xet")
def test_retry_after_is_kept_unless_it_is_too_long(server: Hub, small: Path) -> None:
    busy = [("POST", r".*/commit/main", Fault("status", 429, {"Retry-After": seconds})) for seconds in ("7", "5000")]
    server.faults = Faults(busy)
    waited: list[float] = []
    with pytest.raises(PassingError, match="the Hub answered 429"):
        upload_to(server, small, PublishOptions(), pause=waited.append)
    assert waited == [7.0]


@pytest.mark.usefixtures("no_xet")
def test_somebody_else_commits_in_between(server: Hub, small: Path) -> None:
    """A commit on an older parent is refused, and made again on the newer one."""
    published_to(server, small)
    repo = server.uploaded(REPO)
    (small / "README.md").write_text((small / "README.md").read_text() + "\nOne more line.\n")
    other = Repository(REPO, endpoint=server.url, token=TOKEN)

    def faults(method: str, path: str) -> Fault | None:
        if path.endswith("/commit/main"):
            server.faults = lambda method, path: None
            theirs = hub.Addition("notes.md", b"theirs", sha256_bytes(b"theirs"))
            other.commit([theirs], [], "theirs", parent=repo.refs["main"])
        return None

    server.faults = faults
    published_to(server, small)
    assert [commit.message for commit in repo.history[4:]] == ["theirs", "Update the card"]
    assert (repo.commits[repo.refs["main"]] / "notes.md").read_bytes() == b"theirs"


@pytest.mark.usefixtures("no_xet")
def test_a_file_that_changes_while_it_is_sent_is_not_committed(server: Hub, small: Path) -> None:
    def faults(method: str, path: str) -> Fault | None:
        if path.endswith("/preupload/main"):
            write_gguf(small / f"{STEM}-imatrix.gguf", 16_384, seed=77)
        return None

    server.faults = faults
    with pytest.raises(VerificationError, match="changed while it was sent"):
        published_to(server, small)
    assert server.uploaded(REPO).history == []


@pytest.mark.usefixtures("no_xet")
def test_refused_with_nothing_sent(server: Hub, set_dir: Path) -> None:
    """What the disk holds is looked at, not what is remembered; not even a repository is made."""
    path = set_dir / Q4
    stat = path.stat()
    upload_to(server, set_dir, PublishOptions(), send=False)  # remembers the hashes
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write_gguf(set_dir / f"{STEM}-IQ2_XS.gguf", 16_384, seed=5, general__source__url="/home/me/model")
    with pytest.raises(VerificationError) as caught:
        published_to(server, set_dir)
    assert caught.value.what.startswith(f"3 things forbid publishing to {REPO}:\n")
    assert f"{Q4} is not the file that quantset.json names" in caught.value.what
    assert "key general.source.url holds a path of this machine: '/home/me/model'" in caught.value.what
    assert {request.method for request in server.requests} == {"GET"}


@pytest.mark.usefixtures("no_xet")
def test_front_matter_that_the_hub_refuses_is_told_before_the_weights_are_sent(server: Hub, small: Path) -> None:
    said = json.dumps({"errors": [{"message": '"base_model" is wrong'}], "warnings": []}).encode()
    server.pages["/api/validate-yaml"] = lambda request: Reply(400, said, {"Content-Type": "application/json"})
    with pytest.raises(BadInputError) as caught:
        published_to(server, small)
    assert caught.value.what == 'the Hub does not accept the front matter of README.md: "base_model" is wrong'
    assert {request.method for request in server.requests} == {"GET", "POST"}
    assert server.asked("/lfs") == []


def test_a_token_that_the_hub_does_not_know(server: Hub, small: Path) -> None:
    with pytest.raises(BadInputError) as caught:
        upload_to(server, small, PublishOptions(), token="hf_unknown")
    assert caught.value.what.startswith("the Hub does not accept the token (")
    assert caught.value.next_step is not None


def test_over_xet(server: Hub, set_dir: Path, tmp_path: Path) -> None:
    """The client's own way: chunks go to its local store, the hash is computed on the way, and read back they are the
    same."""
    server.xet = tmp_path / "xet"
    server.xet.mkdir()
    published_to(server, set_dir)
    repo = server.uploaded(REPO)
    assert commits(repo) == [*WEIGHTS, LAST]
    assert server.asked("/lfs") == []  # no byte went the other way
    assert len(server.asked("/xet-write-token/")) >= 1
    assert len(xet_files(server.xet)) == 6
    check_the_same(server, set_dir, tmp_path / "home")
    assert len(server.asked("/xet-read-token/")) >= 1


# --- published files on another day ----------------------------------------------------------------------------------


@pytest.fixture
def here(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server is the Hub of this process, and the token that of its environment."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def call(*argv: str | Path) -> Result:
    return CliRunner(catch_exceptions=False).invoke(cli.main, [str(word) for word in argv], prog_name="gemma-gguf")


@pytest.mark.usefixtures("no_xet")
def test_the_command(here: Hub, small: Path) -> None:
    """The plan, then the upload; the card is rendered for the place it goes to."""
    goal = "test/other-GGUF"
    shown = call("publish", small, "--repo", goal, "--json")
    assert shown.exit_code == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert (told["sent"], told["repo"], told["creates"], told["refusals"]) == (False, goal, True, [])
    assert told["commits"] == [WEIGHTS[0], WEIGHTS[1], [Q4], LAST]
    assert {(row["action"], row["reason"]) for row in told["operations"]} == {("upload", "not in the repository")}
    assert "Nothing was sent. Send it with: --yes" in shown.stderr
    assert f"New repository: {goal}, private" in shown.stderr
    assert manifest.load(small).card.repo == goal
    assert goal in (small / "README.md").read_text()
    assert [r for r in here.requests if r.method != "GET"] == []
    sent = call("publish", small, "--yes", "--public", "--json")
    assert sent.exit_code == 0, sent.stderr
    assert json.loads(sent.stdout)["sent"] is True
    repo = here.uploaded(goal)
    assert (commits(repo), repo.private) == ([WEIGHTS[0], WEIGHTS[1], [Q4], LAST], False)
    assert TOKEN not in shown.stdout + shown.stderr + sent.stdout + sent.stderr
    again = call("publish", small)
    assert again.exit_code == 0
    assert f"{goal} holds this set" in again.stderr
    assert "Nothing was sent" not in again.stderr


@pytest.mark.usefixtures("no_xet")
def test_the_command_refuses(here: Hub, small: Path, tmp_path: Path) -> None:
    facts = manifest.load(small)
    model = facts.model.model_copy(update={"base_is_dequantised": True})
    manifest.save(facts.model_copy(update={"model": model}), small)
    factory.write_card(small, card.Renderer())
    shown = call("publish", small, "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["refusals"][0].startswith("the weights of this set were rebuilt from a quant")
    refused = call("publish", small, "--yes")
    assert refused.exit_code == 1
    assert "error: not published: the weights of this set were rebuilt from a quant" in refused.stderr
    assert "--allow-demo" in refused.stderr
    assert [r for r in here.requests if r.method != "GET"] == []
    allowed = call("publish", small, "--yes", "--allow-demo")
    assert allowed.exit_code == 0, allowed.stderr
    assert commits(here.uploaded(REPO))[-1] == LAST
    missing = call("publish", tmp_path / "nowhere")
    assert missing.exit_code == 1
    assert "has no quantset.json: it is not a quant set" in missing.stderr


def test_options_of_publishing_need_it() -> None:
    done = call("run", "demo", "--stream")
    assert done.exit_code == 2
    assert "--stream, --public, --prune and --allow-demo belong to --publish" in done.stderr


@pytest.mark.usefixtures("no_xet")
def test_a_set_is_found_by_its_model(here: Hub, small: Path) -> None:
    shown = call("publish", "google/gemma-3-4b-it", "--out", small.parent, "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["repo"] == REPO


@pytest.mark.usefixtures("no_xet")
def test_a_published_file_that_is_gone_here_is_not_missed(here: Hub, small: Path) -> None:
    """`verify` and `card` take a set whose file is only in the repository, and `publish` sends what is left."""
    published_to(here, small)
    entry = manifest.load(small).file(Q4)
    assert entry is not None
    manifest.save(manifest.load(small).with_file(published(entry)), small)
    (small / Q4).unlink()
    factory.write_card(small, card.Renderer())
    assert f"| [{Q4}]" in (small / "README.md").read_text()
    verified = {result.name: result for result in proof.verify_set(small)}
    assert (verified[Q4].problem, verified[Q4].place) == (None, f"{REPO}, commit {COMMIT[:9]}")
    seen = upload_to(here, small, PublishOptions(prune=True))
    assert [(o.name, o.action) for o in seen.plan.operations if o.name == Q4] == [(Q4, "skip")]
    assert commits(here.uploaded(REPO))[4:] == [["quantset.json"]]
    assert Q4 in files_of(here.uploaded(REPO).commits[here.commit_of(REPO)])


# --- a set that is sent while it is made -----------------------------------------------------------------------------

STREAMED = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
STREAMED_REPO = "test/streamed-GGUF"


@pytest.mark.usefixtures("no_xet")
def test_waves_are_sent_and_deleted_and_resumed(
    finished: Report, set_options: Options, here: Hub, tmp_path: Path
) -> None:
    """Five quants that do not fit the budget: refused in the middle, gone on with, byte for byte those of a plain run;
    what is published is not made again, also when the run was killed before it could write that down."""
    stem = "test_tiny-vision"
    out = tmp_path / "out"
    set_dir = out / f"{stem}-GGUF"
    how = PublishOptions(repo=STREAMED_REPO, public=True, stream=True)
    base, imatrix = (finished.set_dir / f"{stem}-{what}.gguf" for what in ("bf16", "imatrix"))
    options = replace(set_options, out=out, base=base, imatrix=imatrix, recipes=STREAMED, disk_budget=5_500_000)
    options = replace(options, publish=how)
    # The third file of the set to arrive is refused: some are published then, and some are still here.
    count = iter(range(100))
    here.faults = lambda method, path: (
        Fault("status", 403) if path.endswith("/commit/main") and next(count) == 2 else None
    )
    with pytest.raises(BadInputError, match="this token may not write"):
        factory.run(options)
    repo = here.uploaded(STREAMED_REPO)
    assert len(commits(repo)) == 2
    assert repo.private
    sent_first = {name for (name,) in commits(repo)}
    recorded = {e.name: e for e in manifest.load(set_dir).files if e.state == "remote"}
    assert set(recorded) == sent_first
    assert not any((set_dir / name).exists() for name in sent_first)
    # As if the run had been killed after the commit and before it was written down.
    (name, *_) = sent_first
    shutil.copy(finished.set_dir / name, set_dir / name)
    back = recorded[name].model_copy(update={"state": "local", "remote": None})
    manifest.save(manifest.load(set_dir).with_file(back), set_dir)
    report = factory.run(options)
    made = {done.name for done in report.done if done.stage == "quantize" and done.made}
    assert made.isdisjoint(sent_first)
    assert not any((set_dir / f"{stem}-{recipe}.gguf").exists() for recipe in STREAMED)
    facts = manifest.load(set_dir)
    assert {e.recipe for e in facts.files if e.state == "remote"} == set(STREAMED)
    assert (facts.card.repo, repo.private) == (STREAMED_REPO, False)
    check_nothing_doubled(repo)
    assert "README.md" in commits(repo)[-1]
    assert [group for group in commits(repo)[:-1] if "README.md" in group] == []
    last = repo.commits[repo.refs["main"]]
    for recipe in STREAMED:
        file = f"{stem}-{recipe}.gguf"
        assert sha256_file(last / file) == sha256_file(finished.set_dir / file), recipe
    # And once more: nothing is left to do.
    n_commits = len(repo.history)
    again = factory.run(options)
    assert [done.name for done in again.done if done.made and done.stage in ("quantize", "publish")] == []
    assert len(repo.history) == n_commits


# --- the campaign ----------------------------------------------------------------------------------------------------

# What may befall a request, by method and path. 401 and 403 from the Hub end a run, so there are few of them.
BEFALLS: list[tuple[str, str, list[Fault]]] = [
    (
        "PUT",
        r"/lfs/.*",
        [
            Fault("cut"),
            Fault("cut"),
            Fault("lost"),
            Fault("slow"),
            Fault("status", 500),
            Fault("status", 503),
            Fault("status", 403),
            Fault("status", 429, {"Retry-After": "1"}),
        ],
    ),
    (
        "POST",
        r".*/commit/main",
        [Fault("lost"), Fault("lost"), Fault("cut"), Fault("status", 503), Fault("status", 401), Fault("status", 403)],
    ),
    ("POST", r".*/(preupload/main|batch)", [Fault("status", 502), Fault("cut"), Fault("status", 429), Fault("lost")]),
    ("POST", r"/lfs/.*", [Fault("status", 500), Fault("lost")]),
    ("POST", r"/api/repos/create", [Fault("lost")]),
    ("POST", r"/api/validate-yaml", [Fault("status", 503), Fault("cut")]),
    ("PUT", r".*/settings", [Fault("lost"), Fault("status", 500)]),
    ("GET", r".*/(tree/.*|revision/main)", [Fault("status", 500), Fault("lost"), Fault("slow")]),
    ("GET", r"/api/whoami-v2", [Fault("status", 429, {"Retry-After": "1"})]),
]
ENDING = {401: 2, 403: 2}  # at most so many of the Hub's own


class Campaign:
    """So many faults at random, and a kill of the uploading process in a transfer and in a commit.

    Of `n_parts` parts of files so many are spoilt that the faults are spread over more than half of a large upload.
    """

    def __init__(self, n_faults: int, seed: int, n_parts: int, kill: Callable[[], None]) -> None:
        self.left = n_faults
        self.rates = {"GET": 0.1, "POST": 0.3, "PUT": min(0.3, 1.7 * n_faults / n_parts)}
        self.met: Counter[str] = Counter()
        self.kills: list[str] = []
        self._random = random.Random(seed)
        self._ending = Counter(ENDING)
        self._to_kill = {
            r"/lfs/.*": ("PUT", 12, Fault("cut", then=kill)),
            r".*/commit/main": ("POST", 9, Fault("lost", then=kill)),
        }
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for pattern, (wanted, number, fault) in [*self._to_kill.items()]:
                if method == wanted and re.fullmatch(pattern, path):
                    self._seen[pattern] += 1
                    if self._seen[pattern] >= number:
                        del self._to_kill[pattern]
                        self.kills.append(f"{method} {path}")
                        return fault
            # Looking is what everything else waits for, so it is spared most of the time.
            if self.left == 0 or self._random.random() > self.rates.get(method, 0):
                return None
            for wanted, pattern, faults in BEFALLS:
                if method == wanted and re.fullmatch(pattern, path):
                    fault = self._random.choice(faults)
                    if fault.status in ENDING and not path.startswith("/lfs/"):
                        if self._ending[fault.status] == 0:
                            return None
                        self._ending[fault.status] -= 1
                    self.left -= 1
                    self.met[f"{fault.status or fault.how}"] += 1
                    return fault
        return None


def linked(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))


@pytest.mark.proof
def test_publish_through_fifty_faults_and_two_kills(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """All 27 recipes, projectors, imatrix and card of a set, by the command itself, over LFS in parts of 1 MiB.

    PUBLISH_SET names another set, such as the demo's; it is linked, not changed.
    """
    given = os.environ.get("PUBLISH_SET")
    source = Path(given) if given else request.getfixturevalue("finished").set_dir
    set_dir = Path(shutil.copytree(source, tmp_path / "out" / source.name, copy_function=linked))
    repo_name, seed = "test/campaign-GGUF", int(os.environ.get("SEED", "7"))
    with serving() as server:
        server.open_for_writing(tmp_path / "store", **{TOKEN: "test"})
        environment = server.environment(tmp_path / "home", token=TOKEN)
        environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        argv = [
            sys.executable,
            "-m",
            "gemma_gguf",
            "publish",
            str(set_dir),
            "--repo",
            repo_name,
            "--yes",
            "--public",
            "--allow-demo",
        ]
        running: list[subprocess.Popen[str]] = []
        sizes = [path.stat().st_size for path in set_dir.rglob("*.gguf")]
        n_parts = sum(-(-n_bytes // server.part_size) for n_bytes in sizes)
        server.faults = campaign = Campaign(50, seed, n_parts, lambda: running[-1].kill())  # noqa: PLW0108 - not yet there
        ends: list[int] = []
        started = time.monotonic()
        while not ends or ends[-1] != 0:
            assert len(ends) < 20, ends
            with (tmp_path / f"run-{len(ends)}.txt").open("w+") as said:
                running.append(subprocess.Popen(argv, env=environment, stdout=said, stderr=said, text=True))
                ends.append(running[-1].wait())
                said.seek(0)
                text = said.read()
            assert TOKEN not in text
            # Ended by a kill, or by an answer that only a person can do something about.
            assert ends[-1] in (0, -signal.SIGKILL) or "next:" in text, text
        took = time.monotonic() - started
        server.faults = lambda method, path: None
        repo = server.uploaded(repo_name)
        assert campaign.left == 0, campaign.left
        assert len(campaign.kills) == ends.count(-signal.SIGKILL) == 2
        check_nothing_doubled(repo)
        weights, last = commits(repo)[:-1], commits(repo)[-1]
        assert {"README.md", "quantset.json"} <= set(last)
        assert all(name.endswith(".gguf") for group in weights for name in group)
        assert all(commit.private for commit in repo.history)
        assert repo.private is False
        got = Path(snapshot_download(repo_name, endpoint=server.url, token=TOKEN, local_dir=tmp_path / "got"))
        names = [name for name in files_of(set_dir) if not name.startswith(".")]
        assert [name for name in files_of(got) if not name.startswith(".")] == names
        assert {n: sha256_file(got / n) for n in names} == {n: sha256_file(set_dir / n) for n in names}
        n_bytes = sum((set_dir / name).stat().st_size for name in names)
        puts = [request for request in server.requests if request.method == "PUT" and request.path.startswith("/lfs/")]
    print(
        f"\npublish: {len(names)} files, {n_bytes:,} bytes, {len(repo.history)} commits, {sum(campaign.met.values())} "
        f"faults {dict(sorted(campaign.met.items()))}, kill -9 in {campaign.kills}, {len(ends)} runs {ends}, "
        f"{len(server.requests)} requests, {len(puts)} of them parts of files, {took:.0f} s, seed {seed}: "
        "all downloaded again with the same sha256, nothing committed twice, the card last"
    )
